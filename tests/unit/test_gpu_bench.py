"""Every part of tools/bench/gpu.sh at a tiny size on this CPU, in this
process: a GPU must not meet a typo. Holds no timing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.gpu import common  # noqa: F401  (sets the device up before megatron-core is imported)
from tools.bench.gpu import run as bench

# isort: split

ROOT = Path(__file__).resolve().parents[2]
MOST_S = 13 * 60  # all parts together, as docs/gpu.md says


pytestmark = pytest.mark.usefixtures("world")


def rows_of(folder: Path, part: str) -> tuple[int, dict]:
    file = folder / "part.json"
    status = bench.run_part(part, True, file)
    return status, json.loads(file.read_text())


@pytest.mark.parametrize("part", [*bench.LIMITS, "loop:0"])
def test_the_part_runs_to_its_end(tmp_path: Path, part: str) -> None:
    status, found = rows_of(tmp_path, part)
    assert status == 0 and "error" not in found and "unfinished" not in found, found.get("traceback", found)
    assert found["packages"]["torch"] and found["gpu"] is None
    for row in found.get("rows", [found]):
        assert row.get("equal") is not False and row.get("passed") is not False, row
    text = bench.headline(found)
    assert text.strip() and "error" not in text
    if part.startswith("train"):
        [row] = found["rows"]
        assert (
            row["layers"] == 2
            and row["tokens_per_s"] > 0
            and set(row["gradients_s"]) == {"off", "replay"}
            and row["kernels"]
        )
        assert (
            row["experts"] == ("grouped" if part in ("train:0", "train:1") else "sequential")
            and found["one_layer"]["gradients_s"]
        )
        assert row["profile"]["layers"] == "megatron-core local layers"
    if part.startswith("loop"):
        assert all(row["time/update_s"] > 0 and row["mismatch/kl_k3"] < 1e-9 for row in found["rows"])
        assert found["medians"]["sync/bytes"] > 0
    if part == "correctness":
        assert [row["dtype"] for row in found["rows"]] == ["float32"] * 2 + ["bfloat16"] * 2


def test_a_part_that_fails_half_way_keeps_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.bench.gpu import ceilings

    def half(smoke: bool):
        yield {"copy_bytes_per_s": 1.0}
        yield {"row": {"tokens": 3}}
        raise ValueError("here\nit ends")

    monkeypatch.setattr(ceilings, "run", half)
    status, found = rows_of(tmp_path, "ceilings")
    assert status == 1 and found["error"] == "ValueError: here it ends" and found["rows"] == [{"tokens": 3}]
    assert found["copy_bytes_per_s"] == 1.0 and "half" in found["traceback"]
    assert bench.headline(found).splitlines() == ["    tokens 3", "    error ValueError: here it ends"]


def test_a_part_over_its_limit_keeps_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """And leaves none of the processes that it started."""
    part = tmp_path / "python"
    part.write_text("""#!/bin/sh
sleep 300 &
echo $! > "$6.pid"
echo '{"part": "train:1", "unfinished": true, "one_layer": {"a": 1}}' > "$6"
wait
""")
    part.chmod(0o755)
    monkeypatch.setattr(bench.sys, "executable", str(part))
    assert not bench.start("train:1", False, tmp_path, 3.0)
    found = json.loads((tmp_path / "train_1.json").read_text())
    assert found["error"] == "over its limit of 3 s" and found["one_layer"] == {"a": 1}
    assert "FAILED" in capsys.readouterr().out
    gone = Path("/proc", (tmp_path / "train_1.json.pid").read_text().strip(), "stat")
    assert not gone.exists() or gone.read_text().split()[2] == "Z"


def test_all_parts_fit_their_time_and_a_budget_names_what_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert sum(bench.LIMITS.values()) <= MOST_S
    begun: list[str] = []
    monkeypatch.setattr(bench, "start", lambda name, smoke, out, limit: begun.append(name) or True)
    monkeypatch.setattr(
        sys, "argv", ["run", "--out", str(tmp_path), "--budget", "100", "--parts", "train:3,correctness,logprob"]
    )
    assert bench.main() == 0
    assert begun == ["train:3", "logprob"]
    assert "not run within --budget 100: bash tools/bench/gpu.sh --parts correctness\n" in capsys.readouterr().out


def test_the_one_command(tmp_path: Path) -> None:
    """The shell script itself, with the part that imports least."""
    command = ["bash", "tools/bench/gpu.sh", "--cpu-smoke", "--parts", "ceilings"]
    env = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 parts ok" in done.stdout and json.loads((tmp_path / "ceilings.json").read_text())["smoke"] is True
