"""`megarl plan --search`: what it lists the engine takes, with the memory that `megarl plan` gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.cli import main
from megarl.config import load_config
from megarl.estimate.cluster import Hosts, needed, plan_run
from megarl.estimate.memory import stage_held
from megarl.estimate.roofline import model_flops
from megarl.estimate.search import Cuts, Search, machine_of
from megarl.refusals import check
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "multi_node"


@pytest.mark.parametrize(
    "layout",
    [
        Layout(world=8),
        Layout(tp=2, pp=2, vpp=2, ep=4, world=16),
        Layout(tp=2, ep=2, etp=2, world=8),
        Layout(pp=4, ep=2, first_stage_layers=1, last_stage_layers=1, world=8),
    ],
    ids=str,
)
def test_what_a_stage_holds_by_layers_is_what_the_map_lists(hf_config: dict[str, Any], layout: Layout) -> None:
    for changes in ({"mlp_only_layers": [0]}, {"tie_word_embeddings": True}):
        weight_map = WeightMap({**hf_config, **changes})
        for stage in range(layout.pp):
            assert Cuts(weight_map).stage(layout, stage) == stage_held(weight_map, layout, stage)


def test_every_layout_that_is_found_is_taken_and_fits_where_it_is_pasted(run_yaml: Path) -> None:
    given = ["engine.dtype=bfloat16", "batch.prompts=4", "batch.group=4"]  # mini-batches for at most 4 replicas
    search = Search(load_config(run_yaml, given), machine_of(0.002, 4, 50.0))
    found = search.fitting(8)
    assert 10 < len(found) < search.tried and len({tuple(one.overrides) for one in found}) == len(found)
    assert {one.recompute for one in found} > {"none"} and search.fewest() in (1, 2, 4, 8)
    sizes = [one.parallel for one in found]
    assert all(8 // (size["tp"] * size["pp"] * size["cp"]) <= 4 for size in sizes)
    shown = search.shown(found, 8)
    assert len(shown) == 10 and all(one.memory.sync for one in shown)
    for one in shown:
        taken = load_config(run_yaml, [*given, *one.overrides])  # on top of another layout
        check(taken, "run", world_size=8)
        assert needed(plan_run(taken, 8, 1, Hosts(4, 50.0))) == one.memory.total <= 0.9 * 0.002 * 2**30


def test_a_float32_optimizer_is_not_offered_in_host_memory(run_yaml: Path) -> None:
    search = Search(load_config(run_yaml, ["engine.dtype=float32"]), machine_of(0.0035, 4, 50.0))
    found = search.fitting(4)
    assert found and not any(one.offload for one in found) and search.fewest(offload=1.0) is None


def test_with_the_optimizer_in_host_memory_less_is_enough(run_yaml: Path) -> None:
    search = Search(load_config(run_yaml, ["engine.dtype=bfloat16"]), machine_of(0.0012, 4, 50.0))
    found = search.fitting(4)
    hosted = [one for one in found if one.offload]
    assert hosted and all(one.memory.host > 0 == one.memory.optimizer and one.seconds.optimizer > 0 for one in hosted)
    assert all(one.memory.host == 0 for one in found if not one.offload)
    fewest, with_host = search.fewest(), search.fewest(offload=1.0)
    assert fewest and with_host and with_host < fewest


def test_the_fewest_gpus_are_found_beyond_those_asked_for(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", str(run_yaml), "--search", "--world", "1", "--gpus-per-host", "1", "--json"]
    assert main([*command, "--gpu-gib", "0.002"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fit"] == 0 and found["fewest_gpus"] >= found["fewest_gpus_offloaded"] > 1

    search, tried = Search(load_config(run_yaml), machine_of(80.0, 8, 50.0)), list[int]()

    def fewest(*fits: int) -> int | None:
        monkeypatch.setattr(search, "fits", lambda count, offload: tried.append(count) or count in fits)
        tried.clear()
        return search.fewest()

    assert fewest(4, 8) == 4 and fewest(24, 32) == 24
    assert fewest(40, 64) == 40  # though 48 and 56, between the two, do not fit
    assert fewest(2112, 4096) == 2112 and fewest() is None and fewest(4096) == 4096 and len(tried) < 50


def test_the_command(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(run_yaml), "--search", "--world", "4", "--gpus-per-host", "4"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["fit"]
        and found["fewest_gpus"] == found["fewest_gpus_offloaded"] == 1
        and found["best"][0]["tokens_per_s"] > 0
    )
    assert main(command) == 0
    assert "ranked by arithmetic" in capsys.readouterr().out
    assert main([*command, "--gpu-gib", "0.0001"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_the_arithmetic_of_qwen3_30b() -> None:
    """3.35 billion parameters work on a token of which 0.31 are the embedding, which does not multiply."""
    hf = json.loads((EXAMPLES / "models" / "Qwen3-30B-A3B" / "config.json").read_text())
    assert model_flops(WeightMap(hf), 1, 0) == pytest.approx(6 * 3.04e9, rel=0.01)
