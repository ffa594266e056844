"""What `megarl plan --trace` says of a rank that was simulated: links, tables and the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megarl.cli import main
from megarl.config import load_config
from megarl.errors import UserError
from megarl.simulate import command, shim
from megarl.simulate.command import describe, link_bytes, recompute_gain, tables
from megarl.simulate.page import memory_chart, write_page

GIB = 2**30


@pytest.fixture
def found() -> dict[str, Any]:
    curve = [["model", 0, GIB], ["packs", 1, GIB], ["gradients", 2, 3 * GIB], ["metrics", 3, GIB], ["end", 4, 0]]
    peaks = {phase: {"bytes": size, "lines": [[f"{phase}.py:1 f", size]]} for phase, _, size in curve}
    pair, across = [0, 1], [0, 8, 16, 24]
    sent = [
        ["gradients", "", pair, "allgather_base", "", 1, 100],
        ["gradients", "", across, "allreduce_coalesced", "", 1, 400],
        ["gradients", "", list(range(16)), "alltoall_base", "", 1, 1600],
        ["gradients", "", [8], "send", "", 1, 7],
        ["gradients", "", [8], "recv", "", 1, 7],
    ]
    waits = [["gradients", "item", "", "megarl/a.py f", 3], ["model", "item", "", "megarl/b.py f", 9]]
    rank = {"rank": 0, "world": 64, "packs": 2, "minibatches": 2, "moe_layers": 4, "seconds": 5.0, "cpu_seconds": 4.0}
    record = rank | {"peaks": peaks, "curve": curve, "sent": sent, "waits": waits}
    nothing = {"planned": 3 * GIB, "saved": 0, "flops": 0, "share": 0.0}
    record["recompute"] = {"none": nothing, "full": {"planned": GIB, "saved": GIB, "flops": 5e12, "share": 1 / 3}}
    record["planned"] = {"sync": GIB // 4, "total": 5 * GIB // 2}
    record["link_bytes"] = link_bytes(record, 8)
    return record


def test_bytes_go_over_the_slowest_link_of_a_ring_and_evenly_to_all(found: dict[str, Any]) -> None:
    inside = 100 + 1600 * 7 // 16
    between = 2 * 400 * 3 // 4 + 1600 * 8 // 16 + 7
    assert found["link_bytes"] == {"inside a host": inside, "between hosts": between}


def test_tables_and_page(found: dict[str, Any], tmp_path: Path) -> None:
    text = describe(found, 3.6 * GIB)
    assert (
        "does not fit: 3.250 of 3.24 GiB (3.6, of which 10% stay free)" in text
        and "3 gradients: item, megarl/a.py f" in text
    )
    assert "megarl/b.py" not in text  # the step's waits alone
    write_page(tmp_path / "page.html", "examples/a_model.yaml", found, tables(found), "no, of 2 GiB")
    page = (tmp_path / "page.html").read_text()
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])
    (chart,) = data["charts"]
    assert [line["name"] for line in chart["lines"]] == ["model", "packs", "gradients", "metrics"]
    assert chart["lines"][2]["values"] == [None, None, 3.0, None, None] and chart["x"] == [0, 1, 2, 3, 4]
    assert "peak by engine.recompute" in page and "gradients.py:1 f" in page
    assert "full: 1.000 GiB less, 5.0 TFLOP more a pack (33% of the layers" in page
    assert memory_chart(found["curve"]).low == 0.0


def test_a_step_that_fits_does_not_where_its_checkpoint_does_not(found: dict[str, Any]) -> None:
    assert "\nfits: 3.250 of 3.6 GiB" in describe(found, 4.0 * GIB)
    found["planned"]["total"] = 4 * GIB  # with what a save gathers
    text = describe(found, 4.0 * GIB)
    assert "does not fit: 4.000 of 3.6 GiB" in text and "traced: 3.000 GiB" in text


def test_the_command_judges_by_the_plan_where_that_is_more(
    found: dict[str, Any], run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {how: {"moe": 1} for how in ("none", "selective", "full")}
    layers = {"layers": {"moe": 1}, "kept": kinds, "forward": {"moe": 1}, "update": {"none": 1, "selective": 1}}
    for at in found["peaks"].values():
        at["bytes"] = 1000
    monkeypatch.setattr(command, "simulated_ranks", lambda requests: [found, layers])
    options = ["plan", str(run_yaml), "--world", "4", "--trace", "--json", "--gpu-gib"]
    assert main([*options, "1"]) == 0
    traced = json.loads(capsys.readouterr().out)
    assert traced["fits"] and traced["needed"] == traced["planned"]["total"] > 1000 and traced["planned"]["sync"]
    assert main([*options, str(traced["needed"] / 0.91 / GIB)]) == 1
    assert not json.loads(capsys.readouterr().out)["fits"]


def test_recompute_saves_of_each_layer_in_flight_and_pays_for_each(run_yaml: Path) -> None:
    """Stage 0 of two: two MoE layers, each with two micro-batches in flight."""
    kept = {"none": {"moe": 100}, "selective": {"moe": 90}, "full": {"moe": 10}}
    layers = {"layers": {"moe": 1}, "kept": kept, "forward": {"moe": 7}, "update": {"none": 21, "selective": 23}}
    found = recompute_gain(load_config(run_yaml, ["engine.dtype=bfloat16"]), 4, 0, layers)
    assert found["none"]["planned"] > found["selective"]["planned"] >= found["full"]["planned"] > 0
    gains = {how: (gain["saved"], gain["flops"]) for how, gain in found.items()}
    assert gains == {"none": (0, 0), "selective": (40, 4), "full": (4 * 90 - 100, 14)}
    assert found["full"]["share"] == pytest.approx(1 / 3)


def test_a_torch_with_cuda_is_told_where_the_trace_runs(tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text("__version__ = '2.11.0'\ncuda = '13.0'\n")
    with pytest.raises(UserError, match=r"2\.11\.0 here is built for CUDA, as in the container; run it, on any m"):
        shim._version(tmp_path)
