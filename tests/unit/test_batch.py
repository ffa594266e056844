"""Packs: every response exactly once, equal numbers of packs, rows cut the same way for tokens and routes."""

from __future__ import annotations

import random

import pytest
import torch

from megarl.engine.batch import assign, cp_rows, make_pack, make_packs, pack_lengths, router_rows, scatter_rows
from megarl.weights.map.layout import Layout


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_every_response_is_assigned_once_within_the_budget(replicas: int, multiple: int) -> None:
    rng = random.Random(replicas)
    rows = [rng.randrange(1, 60) for _ in range(50)]
    packed = assign(rows, replicas, budget=64, multiple=multiple)
    assert sorted(i for packs in packed for pack in packs for i in pack) == list(range(50))
    assert len({len(packs) for packs in packed}) == 1 and len(packed[0]) % multiple == 0
    assert all(sum(rows[i] for i in pack) <= 64 for packs in packed for pack in packs)
    loads = [sum(rows[i] for pack in packs for i in pack) for packs in packed]
    assert max(loads) - min(loads) <= max(rows)


def test_trap_17_a_replica_with_less_work_gets_empty_packs() -> None:
    packed = assign([60, 60, 60, 2], replicas=2, budget=64)
    assert [len(packs) for packs in packed] == [2, 2]
    alone = assign([40], replicas=2, budget=64)
    assert alone == [[[0]], [[]]]


def test_a_response_longer_than_the_budget_has_a_pack_of_its_own() -> None:
    assert assign([100, 3], 1, budget=10) == [[[0], [1]]]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("cp", [1, 2, 3])
def test_trap_11_router_rows_partition_the_pack(tp: int, cp: int) -> None:
    layout = Layout(tp=tp, cp=cp, world=tp * cp)
    (length,) = pack_lengths([37], layout)
    assert length >= 37 and length % (tp * (2 * cp if cp > 1 else 1)) == 0
    seen = torch.cat([router_rows(length, layout, layout.coord(rank)) for rank in range(layout.world)])
    assert sorted(seen.tolist()) == list(range(length))
    for rank in range(cp):
        mine = cp_rows(length, cp, rank)
        parts = [
            router_rows(length, layout, layout.coord(layout.rank_of(tp=t, cp=rank, dp=0, pp=0))) for t in range(tp)
        ]
        assert torch.equal(torch.cat(parts), mine)


def test_context_parallel_rows_cost_the_same_under_causal_attention() -> None:
    cost = [int((cp_rows(48, 4, rank) + 1).sum()) for rank in range(4)]
    assert len(set(cost)) == 1


def test_packs_are_padded_to_what_tensor_and_context_parallelism_cut() -> None:
    assert pack_lengths([3, 17, 8, 0], Layout(tp=2, world=2)) == [4, 18, 8, 2]
    assert pack_lengths([3, 17, 8, 0], Layout(tp=2, cp=2, world=4)) == [8, 24, 8, 8]
    assert pack_lengths([3, 17, 8], Layout(tp=2, pp=2, vpp=2, world=4)) == [4, 18, 8]


def test_labels_are_shifted_inside_each_response() -> None:
    layout = Layout()
    first, second = torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10])
    pack = make_pack([4, 2], [first, second], [2, 1], 6, layout, layout.coord(0))
    assert pack.tokens.tolist() == [5, 6, 7, 9, 0, 0]
    assert pack.labels.tolist() == [6, 7, 8, 10, 0, 0]
    assert pack.mask.tolist() == [0, 1, 1, 1, 0, 0]  # row i predicts token i + 1; the second response has one token
    assert pack.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert pack.seq_ids.tolist() == [0, 0, 0, 1, -1, -1]
    values = scatter_rows(pack, [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])], [2, 1])
    assert values.tolist() == [0, -1, -2, -3, 0, 0]


def test_an_empty_pack_has_rows_but_no_weight() -> None:
    layout = Layout(tp=2, world=2)
    (pack,) = make_packs([[]], [], [], layout, layout.coord(0))
    assert pack.padded == 2 and pack.mask.sum() == 0 and (pack.seq_ids == -1).all()
