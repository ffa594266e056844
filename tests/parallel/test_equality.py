"""The quick rows of the equality table, and a control that shows the table can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools import equality  # noqa: E402


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, dict[str, float]]]:
    return equality.compare([row for row in equality.ROWS if row.quick])


@pytest.mark.parametrize("name", [row.name for row in equality.ROWS if row.quick])
def test_a_layout_computes_what_one_rank_computes(results: dict[str, dict[str, dict[str, float]]], name: str) -> None:
    assert all(value <= equality.LIMIT for mode in results[name].values() for value in mode.values()), results[name]


def test_the_table_would_show_a_difference() -> None:
    a = {"x": torch.tensor([1.0, -2.0]), "y": torch.zeros(2)}
    b = {"x": torch.tensor([1.0, -2.0]), "y": torch.tensor([0.0, 3e-5])}
    assert equality.difference(a, a) == 0 and equality.difference(b, a) > equality.LIMIT
    assert equality.difference({"x": a["x"] * (1 + 2e-5), "y": a["y"]}, a) > equality.LIMIT
    assert equality.difference({"x": a["x"] * torch.nan, "y": a["y"]}, a) > equality.LIMIT
    assert equality.difference({"x": a["x"]}, a) > equality.LIMIT
    assert equality.difference(b, a, {"y": 4e-5}) == 0 and equality.difference(b, a, {"x": 4e-5}) > equality.LIMIT
