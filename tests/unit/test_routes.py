"""Routes as arrays: checked as they arrive, reduced to MoE layers, padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megarl.replay import metrics
from megarl.replay.metrics import RoutingSums
from megarl.replay.routes import accept_routes, check_routes, spread_routes
from tests.unit.routers import EXPERTS, ROWS, TOP_K, random_routes

GOOD = random_routes(rows=6).view(3, 2, TOP_K).numpy().astype(np.uint8)


def spoilt(row, values):
    routes = GOOD.astype(np.int16)
    routes[row] = values
    return routes


@pytest.mark.parametrize(
    "routes, said",
    [
        (GOOD[:2], "shape (2, 2, 4)"),
        (GOOD[:, :1], "shape (3, 1, 4)"),
        (GOOD[..., :3], "shape (3, 2, 3)"),
        (GOOD.astype(np.float32), "dtype float32"),
        (GOOD > 3, "dtype bool"),
        (GOOD[0], "shape (2, 4)"),
        (spoilt((1, 0), [0, 1, 2, EXPERTS]), f"row 1 names expert {EXPERTS}, not 4 distinct experts of 0..15"),
        (spoilt((1, 0), [0, 1, 2, -1]), "row 1 names expert -1, not 4"),
        (spoilt((2, 1), [5, 1, 3, 5]), "row 2 names an expert twice, [5, 1, 3, 5] in MoE layer 1, not 4"),
        (spoilt((1, 1), [0, 0, 0, 0]), "row 1 names an expert twice"),
        (np.zeros_like(GOOD), "all zero, not 4"),
    ],
)
def test_trap_07_wrong_routes_are_named_on_arrival(routes, said):
    check_routes(GOOD, 3, 2, EXPERTS, TOP_K)
    with pytest.raises(ValueError) as error:
        check_routes(routes, 3, 2, EXPERTS, TOP_K)
    assert said in str(error.value)


def test_routes_of_all_layers_are_reduced_to_moe_layers():
    np.testing.assert_array_equal(accept_routes(np.repeat(GOOD, 2, axis=1), 3, [0, 3], 4, EXPERTS, TOP_K), GOOD)
    with pytest.raises(ValueError, match="not .tokens - 1, 2 MoE layers of 4 layers, top-k"):
        accept_routes(np.repeat(GOOD, 3, axis=1), 3, [0, 3], 4, EXPERTS, TOP_K)


def test_trap_07_expert_zero_alone_is_right_where_top_k_is_one():
    check_routes(np.zeros((3, 2, 1), np.uint8), 3, 2, EXPERTS, 1)


@pytest.mark.parametrize("experts, top_k", [(16, 4), (8, 2), (6, 4), (5, 5), (300, 8)])
def test_trap_08_padding_rows_are_distinct_and_spread(experts, top_k):
    routes = spread_routes(60, 2, experts, top_k, start=7)
    check_routes(routes.numpy(), 60, 2, experts, top_k)
    load = routes[:, 0].flatten().bincount(minlength=experts)
    assert load.max() - load.min() <= 1
    in_two = [spread_routes(4, 1, experts, top_k), spread_routes(3, 1, experts, top_k, start=4)]
    assert torch.equal(torch.cat(in_two), spread_routes(7, 1, experts, top_k))


def test_routes_compared_with_themselves_agree_without_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    live, rows = random_routes(1)[:, None], torch.arange(ROWS) % 3 > 0
    compared, alike = RoutingSums(1, [0]), RoutingSums(1, [0])
    compared.add(live, live.clone(), rows)
    monkeypatch.setattr(metrics, "agreement", None)
    alike.add(live, live, rows)
    assert torch.equal(compared.agree, alike.agree) and torch.equal(compared.rows, alike.rows)
    assert torch.equal(compared.differs[0], alike.differs[0])


def test_trap_08_padding_rows_count_in_no_statistic():
    own, other = random_routes(1)[:, None], random_routes(2)[:, None]
    counted, padded = RoutingSums(1, [0]), RoutingSums(1, [0])
    counted.add(
        own[:30],
        other[:30],
        torch.ones(30, dtype=torch.bool),
        torch.rand(30, 1, generator=torch.Generator().manual_seed(0)),
    )
    gap = torch.cat([torch.rand(30, 1, generator=torch.Generator().manual_seed(0)), torch.full((10, 1), 99.0)])
    padded.add(own, other, torch.arange(ROWS) < 30, gap)
    assert (
        torch.equal(counted.agree, padded.agree)
        and torch.equal(counted.rows, padded.rows)
        and counted.worst_gap == padded.worst_gap
    )
