"""A checkpoint of each of eight layouts fills an engine of each, weights and optimizer, in resume_ranks.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.tiny_model import make_tiny_model  # noqa: E402

SCRIPT = str(Path(__file__).with_name("resume_ranks.py"))
RANKS = {"begin": 1, "spread": 4, "gather": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a vocabulary that TP pads, and few and small experts."""
    folder = tmp_path_factory.mktemp("resume")
    make_tiny_model(folder / "model", hidden=32, vocab_size=33, experts=4, moe_intermediate=32, head_dim=16)
    return folder


@pytest.mark.parametrize("phase", RANKS)
def test_fault_12_every_layout_goes_on_from_every_other(folder: Path, phase: str) -> None:
    """In order; a later phase reads what an earlier one wrote."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS[phase]}"]
    command = [sys.executable, *(ranks if RANKS[phase] > 1 else []), SCRIPT, str(folder / "model"), str(folder), phase]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert f"ok {phase}" in done.stdout, done.stderr[-3000:]
