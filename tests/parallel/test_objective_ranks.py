"""Critic, KL and entropy terms are the same in every layout:
tests/parallel/objective_ranks.py, one launch for each number of ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.equality import LIMIT, difference  # noqa: E402
from tools.ranks import launch_ranks  # noqa: E402
from tools.tiny_model import make_tiny_model  # noqa: E402

LAUNCHES = {1: ("one", "split"), 2: ("cp2", "dp2"), 4: ("tp2_pp2_ep2", "tp2_pp2_vpp2")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("objective")
    model = make_tiny_model(folder / "model")
    script = Path(__file__).with_name("objective_ranks.py")
    for ranks, layouts in LAUNCHES.items():
        done = launch_ranks(script, ranks, str(model), str(folder), *layouts, timeout_s=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt") for layouts in LAUNCHES.values() for name in layouts}


@pytest.mark.parametrize("name", [name for layouts in LAUNCHES.values() for name in layouts if name != "one"])
def test_a_layout_values_and_learns_as_one_rank_does(results: dict[str, Any], name: str) -> None:
    differences = {key: difference(results[name][key], results["one"][key]) for key in results["one"]}
    assert all(value <= LIMIT for value in differences.values()), differences
