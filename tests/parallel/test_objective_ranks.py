"""Critic, KL and entropy terms are the same in every layout:
tests/parallel/objective_ranks.py, one launch for each number of ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.equality import LIMIT, _difference  # noqa: E402
from tools.tiny_model import make_tiny_model  # noqa: E402

LAUNCHES = {1: ("one", "split"), 2: ("cp2", "dp2"), 4: ("tp2_pp2_ep2", "tp2_pp2_vpp2")}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("objective")
    model = make_tiny_model(folder / "model")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    script = str(Path(__file__).with_name("objective_ranks.py"))
    for ranks, layouts in LAUNCHES.items():
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            script,
            str(model),
            str(folder),
        ]
        done = subprocess.run([*command, *layouts], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt") for layouts in LAUNCHES.values() for name in layouts}


@pytest.mark.parametrize("name", [name for layouts in LAUNCHES.values() for name in layouts if name != "one"])
def test_a_layout_values_and_learns_as_one_rank_does(found: dict[str, Any], name: str) -> None:
    differences = {key: _difference(found[name][key], found["one"][key]) for key in found["one"]}
    assert all(value <= LIMIT for value in differences.values()), differences
