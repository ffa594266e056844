"""The plan of a resharded sync, executed on tensors: every destination
gets exactly its slices, once, and senders share the load.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch

from megarl.errors import UserError
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap
from megarl.weights.rect import Rect
from megarl.weights.reshard.plan import Plan, make_plan
from megarl.weights.reshard.rollout_layout import RolloutLayout, rollout_rects
from tools.bench.plan import CASES

Slices = dict[str, torch.Tensor]
LAYOUTS = [  # what random ones might miss
    (Layout(), RolloutLayout()),
    (Layout(tp=2, pp=2, vpp=2, ep=4, world=16), RolloutLayout(2, 2)),
    (Layout(tp=2, ep=2, etp=2, world=8), RolloutLayout(1, 4)),
    (Layout(tp=2, cp=2, ep=4, world=8), RolloutLayout(3, 1)),
    (Layout(tp=2, pp=2, ep=2, first_stage_layers=1, world=8), RolloutLayout(1, 2, ep=4)),
    (Layout(pp=4, ep=2, world=16), RolloutLayout(2, 1, ep=8)),
]


def random_layouts(count: int) -> list[tuple[Layout, RolloutLayout]]:
    """Of those that the model of conftest allows: 4 layers, 2 key/value heads, 8 experts."""
    rng = random.Random(0)
    found = []
    while len(found) < count:
        tp, etp, cp, pp = rng.choice([1, 2]), rng.choice([1, 1, 2, 4]), rng.choice([1, 1, 2]), rng.choice([1, 2, 4])
        vpp = rng.choice([1, 4 // pp]) if pp > 1 else 1
        first = rng.choice([None, 1]) if pp == 2 and vpp == 1 else None
        layout = Layout(tp, pp, vpp, rng.choice([1, 2, 4, 8]), etp, cp, first, world=pp * rng.choice([2, 4, 8, 16]))
        rollout_tp = rng.choice([1, 2, 4])
        rollout = RolloutLayout(rng.choice([1, 2, 3, 5]), rollout_tp, rng.choice([1, 1, rollout_tp, 2 * rollout_tp]))
        if (
            layout.world % (layout.tp * layout.cp * layout.pp) == 0
            and layout.world % (layout.etp * layout.ep * layout.pp) == 0
        ):
            found.append((layout, rollout))
    return found


def numbered_weights(weight_map: WeightMap) -> Slices:
    """Every element of the model has a value of its own."""
    start, weights = 1, {}
    for name, shape in weight_map.hf_shapes.items():
        count = torch.Size(shape).numel()
        weights[name] = torch.arange(start, start + count, dtype=torch.float64).view(shape)
        start += count
    return weights


def execute(plan: Plan, weight_map: WeightMap, weights: Slices) -> list[Slices]:
    """Runs the senders' lists on tensors cut by the weight map. Returns
    what each rollout rank holds, -1 where nothing came.
    """
    rects = [plan.shards(rank) for rank in range(plan.rollout.world)]
    received = [
        {name: torch.full(rect.size, -1.0, dtype=torch.float64) for name, rect in shards.items()} for shards in rects
    ]
    for rank in range(plan.train.world):
        held: dict[tuple[int, str], torch.Tensor] = {}
        for param in weight_map.params(plan.train, plan.train.coord(rank)):
            held[param.chunk, param.name] = local = torch.zeros(param.shape, dtype=torch.float64)
            for piece in param.pieces:
                local[piece.local.slices] = weights[piece.hf_name][piece.rect.slices]
        for message in plan.sends(rank):
            assert message.destination is not None
            for transfer in message.slices:
                name, rect = transfer.hf_name, rects[message.destination][transfer.hf_name]
                target = received[message.destination][name][transfer.rect.within(rect).slices]
                assert target.shape == transfer.rect.size and bool((target == -1).all()), (
                    f"{name} is written twice or out of bounds"
                )
                target.copy_(transfer.cut(held))
    return received


@pytest.mark.parametrize(("train", "rollout"), LAYOUTS + random_layouts(14), ids=str)
def test_every_rollout_rank_gets_its_slices_once(
    hf_config: dict[str, Any], train: Layout, rollout: RolloutLayout
) -> None:
    weight_map = WeightMap(
        {**hf_config, "mlp_only_layers": [0], "vocab_size": 97}
    )  # a dense layer; a vocabulary to pad
    weights = numbered_weights(weight_map)
    plan = make_plan(train, rollout, weight_map, itemsize=4, bucket_bytes=20_000)
    received = execute(plan, weight_map, weights)
    for rank, slices in enumerate(received):
        wanted = {name: holders[rank % rollout.ranks] for name, holders in rollout_rects(weight_map, rollout).items()}
        assert slices.keys() == {name for name, rect in wanted.items() if rect}
        for name, tensor in slices.items():
            rect = wanted[name]
            assert rect and torch.equal(tensor, weights[name][rect.slices]), (rank, name)


@pytest.mark.parametrize(("train", "rollout"), LAYOUTS, ids=str)
def test_both_ends_list_the_same_messages_and_the_figures_are_their_sums(
    hf_config: dict[str, Any], train: Layout, rollout: RolloutLayout
) -> None:
    plan = make_plan(train, rollout, WeightMap({**hf_config, "mlp_only_layers": [0]}), itemsize=4, bucket_bytes=20_000)
    sent = [message for rank in range(train.world) for message in plan.sends(rank)]
    received = [message for rank in range(rollout.world) for message in plan.receives(rank)]
    assert len({(m.bucket, m.source, m.destination) for m in sent}) == len(sent) == plan.load.messages
    assert {(m.bucket, m.source, m.destination): m for m in sent} == {
        (m.bucket, m.source, m.destination): m for m in received
    }
    pairs = np.zeros((train.world, rollout.world), np.int64)
    for message in sent:
        pairs[message.source, message.destination] += 4 * message.numel
    assert np.array_equal(pairs, plan.load.pairs)
    assert np.array_equal(plan.load.received, plan.held_bytes())  # bytes sent are bytes held: ratio 1.00
    for message in sent:
        shards = plan.shards(message.destination)
        assert message.slices and all(transfer.hf_name in shards for transfer in message.slices)
        assert {plan.bucket_of[transfer.hf_name] for transfer in message.slices} == {message.bucket}


def test_buckets_are_bounded_and_whole_tensors_lie_in_them(hf_config: dict[str, Any]) -> None:
    limit, rollout = 20_000, RolloutLayout(2, 2)
    weight_map = WeightMap({**hf_config, "head_dim": 16})
    plan = make_plan(Layout(tp=2, pp=2, ep=2, world=8), rollout, weight_map, itemsize=4, bucket_bytes=limit)
    assert plan.buckets > 5
    for rank in range(rollout.world):
        sizes = [0] * plan.buckets
        for name, rect in plan.shards(rank).items():
            sizes[plan.bucket_of[name]] += 4 * rect.numel
        assert max(sizes) <= limit and sum(sizes) == plan.held_bytes()[rank]
        counts = [0] * plan.buckets
        for message in plan.receives(rank):
            counts[message.bucket] += 4 * message.numel
        assert counts == sizes
    stages = [
        {message.source // 4 for message in plan.receives(0) if message.bucket == bucket}
        for bucket in range(plan.buckets)
    ]
    assert sum(len(stage) == 2 for stage in stages) >= plan.buckets - 2  # both stages send all the time


@pytest.mark.parametrize(
    ("train", "rollout"),
    [
        (Layout(world=4), RolloutLayout(1, 1)),
        (Layout(world=3), RolloutLayout(2, 2)),
        (Layout(tp=2, cp=2, ep=2, world=8), RolloutLayout(1, 2)),
        (Layout(tp=2, ep=4, world=16), RolloutLayout(3, 1)),
        (Layout(ep=2, etp=2, tp=2, world=8), RolloutLayout(1, 4)),
    ],
    ids=str,
)
def test_replicas_share_the_sending_evenly_in_all_and_in_every_bucket(
    hf_config: dict[str, Any], train: Layout, rollout: RolloutLayout
) -> None:
    plan = make_plan(train, rollout, WeightMap({**hf_config, "vocab_size": 4096}), bucket_bytes=200_000)
    assert plan.load.sent.max() <= 1.10 * plan.load.sent.mean()
    assert plan.buckets > 1
    by_bucket = np.zeros((plan.buckets, train.world))
    for rank in range(train.world):
        for message in plan.sends(rank):
            by_bucket[message.bucket, rank] += message.numel
    assert (by_bucket.max(1) <= 1.25 * by_bucket.mean(1)).all()


def test_in_a_large_model_no_bucket_waits_for_a_few_senders() -> None:
    """1,024 ranks into 32 engines: if every bucket took what its busiest sender takes, receivers would be the limit."""
    hf, train, rollout = CASES["qwen3-235b"]
    load = make_plan(train, rollout, WeightMap(hf)).load
    assert load.lockstep <= load.received.max()


def test_buckets_are_smaller_where_a_trainer_rank_packs_for_many() -> None:
    """It keeps two messages for each of them."""
    hf = CASES["qwen3-235b"][0] | {"num_hidden_layers": 4}
    one, many = (make_plan(Layout(), RolloutLayout(engines, 1), WeightMap(hf)) for engines in (1, 7))
    assert many.buckets > 3 * one.buckets


def test_keys_and_values_are_replicated_where_there_are_more_ranks_than_heads(hf_config: dict[str, Any]) -> None:
    weight_map = WeightMap({**hf_config, "head_dim": 16})  # 4 heads, 2 key/value heads
    rects = rollout_rects(weight_map, RolloutLayout(1, 4))
    layer = "model.layers.0.self_attn."
    assert rects[layer + "k_proj.weight"] == (Rect((0, 0), (16, 64)),) * 2 + (Rect((16, 0), (16, 64)),) * 2
    assert rects[layer + "q_proj.weight"] == tuple(Rect((16 * i, 0), (16, 64)) for i in range(4))
    assert rects[layer + "o_proj.weight"] == tuple(Rect((0, 16 * i), (64, 16)) for i in range(4))


def test_an_uneven_expert_placement_gives_the_first_ranks_one_more(hf_config: dict[str, Any]) -> None:
    rects = rollout_rects(WeightMap({**hf_config, "num_experts": 6}), RolloutLayout(1, 1, ep=4))
    owners = [
        [rank for rank, rect in enumerate(rects[f"model.layers.0.mlp.experts.{e}.up_proj.weight"]) if rect]
        for e in range(6)
    ]
    assert owners == [[0], [0], [1], [1], [2], [3]]


def test_the_vocabulary_is_padded_to_64_rows_before_it_is_cut(hf_config: dict[str, Any]) -> None:
    rects = rollout_rects(WeightMap({**hf_config, "vocab_size": 97}), RolloutLayout(1, 2))
    assert rects["lm_head.weight"] == (Rect((0, 0), (64, 64)), Rect((64, 0), (33, 64)))


def test_what_vllm_cannot_cut_is_refused_by_name(hf_config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="rollout.tp 3 does not divide model.layers"):
        rollout_rects(WeightMap(hf_config), RolloutLayout(1, 3))
    with pytest.raises(UserError, match="rollout ep 3 is not a multiple of tp 2"):
        RolloutLayout(1, 2, ep=3)


def test_a_layout_that_holds_a_tensor_twice_is_found(hf_config: dict[str, Any]) -> None:
    weight_map = WeightMap(hf_config)
    norm = next(entry for entry in weight_map.entries if entry.where == "last")
    weight_map.entries = (*weight_map.entries, dataclasses.replace(norm, name="decoder.twice.weight"))
    with pytest.raises(RuntimeError, match="does not hold every element of .* once"):
        make_plan(Layout(), RolloutLayout(), weight_map, bucket_bytes=20_000)
