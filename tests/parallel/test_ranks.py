"""Real megatron-core ranks over gloo: tests/parallel/ranks.py, one launch for each number of ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.ranks import launch_ranks  # noqa: E402
from tools.tiny_model import make_tiny_model  # noqa: E402

LAUNCHES = {
    1: ("replay_is_a_no_op", "sums_over_micro_batches"),
    4: (
        "layout_of_megatron",
        "gathered_weights",
        "quantized_shards",
        "exchanged_rows",
        "reduced_figures",
        "interleaved_packs",
        "resume_is_exact",
        "converted_checkpoints",
        "planned_memory",
        "canary_of_servers",
    ),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[int, subprocess.CompletedProcess[str]]:
    model = make_tiny_model(tmp_path_factory.mktemp("ranks") / "model")
    script = Path(__file__).with_name("ranks.py")
    return {
        ranks: launch_ranks(script, ranks, str(model), *checks, timeout_s=900) for ranks, checks in LAUNCHES.items()
    }


@pytest.mark.parametrize(("ranks", "check"), [(ranks, check) for ranks, checks in LAUNCHES.items() for check in checks])
def test_inside_ranks(launched: dict[int, subprocess.CompletedProcess[str]], ranks: int, check: str) -> None:
    done = launched[ranks]
    assert f"ok {check}" in done.stdout, done.stderr[-3000:]
