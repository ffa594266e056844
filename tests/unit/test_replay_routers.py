"""Replay in megatron-core's own routers, in a world of one rank: softmax,
pre-softmax, and sigmoid with bias, groups and a scaling factor.

Traps are those of docs/routing.md. The formula of every gate is written here a second time, from the full live scores.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megarl.config import EngineConfig, load_config
from megarl.engine.device import setup_device
from megarl.engine.model import Model, _transformer_config
from megarl.engine.parallel import destroy_parallel
from megarl.engine.profile import choose_profile
from megarl.replay.context import replay_schedule
from megarl.replay.metrics import RoutingSums
from megarl.replay.routes import accept_routes, agreement, check_routes, route_dtype, spread_routes
from megarl.weights.map.weight_map import WeightMap
from tools.one_rank import one_rank

# isort: split
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, get_updated_expert_bias
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_config import TransformerConfig

HIDDEN, EXPERTS, TOP_K, ROWS, SCALE = 24, 16, 4, 40, 2.5
KINDS = {
    "softmax": dict(),
    "pre_softmax": dict(moe_router_pre_softmax=True),
    "sigmoid": dict(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.0,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk_scaling_factor=SCALE,
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module", autouse=True)
def world():
    yield one_rank()
    destroy_parallel()


def make_router(kind, seed=0, experts=EXPERTS, layer=1, **changes):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=experts,
        moe_router_topk=TOP_K,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        add_bias_linear=False,
        **{**KINDS[kind], **changes},
    )
    router = TopKRouter(config, pg_collection=get_default_pg_collection())
    router.set_layer_number(layer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.copy_(torch.randn(experts, HIDDEN, generator=generator) * 0.3)
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.randn(experts, generator=generator) * 0.2)
    return router


def make_input(seed=1, rows=ROWS):
    return torch.randn(rows, 1, HIDDEN, generator=torch.Generator().manual_seed(seed))


def route(router, x, routes=None, present=None, backward=None):
    """Gates [rows, E] and map of one pass with hooks, its record, and
    the router's gradient for the upstream gradient `backward`.
    """
    router.zero_grad()
    with replay_schedule([[router]]) as replay:
        target = None if routes is None else routes[:, None]
        with replay.forward(0, target, present, replay=routes is not None) as record:
            gates, chosen = router(x)
        if backward is not None:
            gates.backward(backward)
    return gates.detach(), chosen, record


def upstream(rows=ROWS, experts=EXPERTS):
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(2))


def live_routes(router, x):
    return route(router, x)[2].stacked()[0][:, 0].long()


def random_routes(seed=3, rows=ROWS, experts=EXPERTS):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts, generator=generator)[:TOP_K] for _ in range(rows)])


def drifted_routes(router, x):
    """For every row experts that its live top-k has not chosen at all."""
    own = live_routes(router, x)
    others = torch.ones(len(own), router.num_experts).scatter(1, own, 0)
    return torch.multinomial(others, TOP_K, generator=torch.Generator().manual_seed(4))


def formula(kind, weight, x, routes):
    """Gates [rows, E] over the replayed set, from the full live scores of the row."""
    logits = x.squeeze(1) @ weight.T
    if kind == "softmax":  # over the chosen
        gate = logits.gather(1, routes).softmax(1)
    elif kind == "pre_softmax":  # over all experts, not renormalised
        gate = logits.softmax(1).gather(1, routes)
    else:  # renormalised over the chosen, scaled; the bias is not in it
        chosen = logits.sigmoid().gather(1, routes)
        gate = SCALE * chosen / chosen.sum(1, keepdim=True)
    return torch.zeros_like(logits).scatter(1, routes, gate)


def map_of(routes, experts=EXPERTS):
    return torch.zeros(len(routes), experts, dtype=torch.bool).scatter(1, routes, True)


# ---- without drift


@every_kind
def test_replaying_the_own_routes_changes_nothing_bitwise(kind):
    router, x = make_router(kind), make_input()
    gates, chosen = router(x)
    gates.backward(upstream())
    plain = router.weight.grad.clone()
    for routes in (None, live_routes(router, x)):
        again, map_, record = route(router, x, routes, backward=upstream())
        assert torch.equal(again, gates) and torch.equal(map_, chosen) and torch.equal(router.weight.grad, plain)
    assert (
        agreement(record.stacked()[0], live_routes(router, x)[:, None]).eq(1).all() and record.stacked()[1].eq(0).all()
    )


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_softmax_routers_equal_transformers_qwen3_moe(norm_topk_prob):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=TOP_K, norm_topk_prob=norm_topk_prob
    )
    against_transformers(make_router("softmax" if norm_topk_prob else "pre_softmax"), Qwen3MoeTopKRouter(config))


def test_sigmoid_router_equals_transformers_deepseek_v3():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=4, topk_group=2
    )
    config.routed_scaling_factor, config.norm_topk_prob = SCALE, True
    router, theirs = make_router("sigmoid"), DeepseekV3TopkRouter(config)
    theirs.e_score_correction_bias.copy_(router.expert_bias)
    against_transformers(router, theirs)


def against_transformers(router, theirs):
    x = make_input()
    with torch.no_grad():
        theirs.weight.copy_(router.weight)
        _, weights, experts = theirs(x)
    gates, chosen, _ = route(router, x)
    assert torch.equal(chosen, map_of(experts))
    torch.testing.assert_close(gates, torch.zeros_like(gates).scatter(1, experts, weights), rtol=1e-6, atol=1e-7)


# ---- the traps


@every_kind
def test_trap_01_gate_is_gathered_from_the_full_scores(kind):
    """Experts that the live top-k has not chosen get a gate that is not zero, and a gradient."""
    router, x = make_router(kind), make_input()
    routes = drifted_routes(router, x)
    gates, chosen, record = route(router, x, routes, backward=upstream())
    assert torch.equal(chosen, map_of(routes)) and (gates.gather(1, routes) > 0).all()
    weight = router.weight.detach().clone().requires_grad_()
    want = formula(kind, weight, x, routes)
    want.backward(upstream())
    torch.testing.assert_close(gates, want.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(router.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)
    assert agreement(record.stacked()[0], routes[:, None]).eq(0).all()

    only_first = routes[:1].expand(
        ROWS, -1
    )  # the same drifted experts everywhere: their rows of the weight, and what the kind couples
    route(router, x, only_first, backward=upstream())
    moved = router.weight.grad.abs().sum(1) > 0
    assert moved[routes[0]].all() and (kind == "pre_softmax" or int(moved.sum()) == TOP_K)


@every_kind
def test_trap_02_weights_are_recomputed_live_and_the_bias_never_weights(kind):
    """Other weights of the router give other gates over the same
    routes; another bias gives other live routes and the same gates.
    """
    router, x, routes = make_router(kind), make_input(), random_routes()
    before, _, _ = route(router, x, routes)
    torch.testing.assert_close(
        before.sum(1), formula(kind, router.weight.detach(), x, routes).sum(1), rtol=1e-6, atol=0
    )
    if kind == "sigmoid":
        own = live_routes(router, x)
        router.expert_bias.mul_(-3)
        assert agreement(own[:, None], live_routes(router, x)[:, None]).mean() < 0.9
        assert torch.equal(route(router, x, routes)[0], before)
    with torch.no_grad():
        router.weight.mul_(1.5)
    after, chosen, _ = route(router, x, routes)
    assert not torch.allclose(after, before) and torch.equal(chosen, map_of(routes))
    torch.testing.assert_close(after, formula(kind, router.weight.detach(), x, routes), rtol=1e-6, atol=1e-7)


def test_trap_03_a_fused_router_would_never_ask_the_hook(monkeypatch):
    """The reason of the refusal: with fusion on, megatron-core returns before it looks at router_replay."""
    from megatron.core.transformer.moe import moe_utils

    router = make_router("softmax")
    router.config.moe_router_fusion = True
    monkeypatch.setattr(moe_utils, "HAVE_TE", True)
    monkeypatch.setattr(
        moe_utils, "fused_topk_with_score_function", lambda logits, **_: (logits, logits > 0), raising=False
    )
    assert not route(router, make_input(), random_routes())[2].live


@every_kind
def test_trap_04_routers_are_addressed_by_place_not_by_a_process_wide_list(kind):
    """Two models in one process, three routers: hooks on one leave the
    others alone, and megatron-core's own list stays empty.
    """
    first, second, other = make_router(kind), make_router(kind, seed=5), make_router(kind, seed=6)
    x, own, different = make_input(), live_routes(make_router(kind, seed=6), make_input()), random_routes()
    with replay_schedule([[first, second]]) as replay, replay.forward(0, torch.stack([different, own], 1), replay=True):
        assert torch.equal(first(x)[1], map_of(different)) and torch.equal(second(x)[1], map_of(own))
        assert other.router_replay is None and torch.equal(other(x)[1], map_of(own))
        with replay_schedule([[other]]) as inner, inner.forward(0, different[:, None], replay=True):
            assert torch.equal(other(x)[1], map_of(different))
        assert other.router_replay is None and torch.equal(second(x)[1], map_of(own))
    assert not RouterReplay.global_router_replay_instances


def test_trap_04_multi_token_prediction_layers_are_skipped(world):
    """Their layer numbers start again at 1. Dense first layers: a router's index counts MoE layers only (trap 10)."""
    chunk = torch.nn.Module()
    chunk.decoder, chunk.mtp = (
        torch.nn.ModuleList([make_router("softmax", layer=n) for n in (3, 2)]),
        make_router("softmax", layer=1),
    )
    model = Model(
        chunk.mtp.config,
        SimpleNamespace(moe_layers=[1, 2]),
        world,
        choose_profile(EngineConfig(), setup_device()),
        bare=[chunk],
    )
    assert [(i, router.layer_number) for i, router in model.routers()] == [(0, 2), (1, 3)]


@every_kind
@pytest.mark.parametrize("order", ["1F1B", "all forwards first"])
def test_trap_05_several_forwards_before_the_first_backward(kind, order):
    """Recompute takes the routes first in, first out. The gradient is
    the one without recompute; a forward-only pass leaves nothing.
    """
    router, inputs = make_router(kind), [make_input(seed) for seed in range(4)]
    routes = [random_routes(seed) for seed in range(4)]
    steps = (
        ["f0", "f1", "b0", "f2", "b1", "f3", "b2", "b3"]
        if order == "1F1B"
        else ["f0", "f1", "f2", "f3", "b0", "b1", "b2", "b3"]
    )

    def gradient(recompute):
        router.zero_grad()
        outs = {}
        with replay_schedule([[router]]) as replay:
            for what, i in steps:
                i = int(i)
                if what == "b":
                    outs[i].backward(upstream())
                    continue
                x = inputs[i].clone().requires_grad_()
                with replay.forward(0, routes[i][:, None], replay=True):
                    outs[i] = checkpoint(lambda a: router(a)[0], False, x) if recompute else router(x)[0]
            left = [len(hook.used) for hook in replay._hooks[0]]
        return router.weight.grad.clone(), left

    want, _ = gradient(recompute=False)
    with torch.no_grad(), replay_schedule([[router]]) as replay:  # forward only, with routes of its own
        for x in inputs:
            with replay.forward(0, random_routes(9)[:, None], replay=True):
                router(x)
    got, left = gradient(recompute=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert left == [0]


@every_kind
def test_trap_06_recompute_sees_the_routes_that_were_used_live_rows_too(kind):
    """Between forward and recompute the router changes, so that routing
    anew would choose others: the used routes come back.
    """
    router, x, routes = make_router(kind), make_input(), random_routes()
    present = torch.arange(ROWS) % 3 > 0
    own = live_routes(router, x)
    used = torch.where(present[:, None], routes, own)
    maps = []

    def forward(a):
        gates, chosen = router(a)
        maps.append(chosen)
        return gates

    leaf = x.clone().requires_grad_()
    with replay_schedule([[router]]) as replay:
        with replay.forward(0, routes[:, None], present, replay=True) as record:
            out = checkpoint(forward, False, leaf)
        assert torch.equal(record.stacked()[0][:, 0].long(), own)
        with torch.no_grad():
            router.weight.copy_(make_router(kind, seed=7).weight)
        out.backward(upstream())
    assert len(maps) == 2 and torch.equal(maps[0], map_of(used)) and torch.equal(maps[1], maps[0])
    assert not torch.equal(map_of(live_routes(router, x)), maps[0])


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


def test_trap_12_more_than_256_experts():
    """300 experts: recorded, sent as bytes of the wire's dtype,
    replayed; bitwise the live pass. uint8 would have wrapped.
    """
    assert (route_dtype(256), route_dtype(257), route_dtype(65536)) == (np.uint8, np.uint16, np.uint16)
    router, x = make_router("softmax", experts=300), make_input()
    gates, chosen, record = route(router, x)
    own = record.stacked()[0]
    assert own.max() > 255
    wire = own.numpy().astype(route_dtype(300)).tobytes()
    routes = torch.from_numpy(np.frombuffer(wire, route_dtype(300)).astype(np.int64).reshape(ROWS, TOP_K))
    again, map_, _ = route(router, x, routes)
    assert torch.equal(again, gates) and torch.equal(map_, chosen)


def test_trap_13_expert_bias_is_frozen_and_there_is_no_auxiliary_loss(world, hf_config):
    """The engine's config says so. The count that would move the bias is of the experts used, the replayed ones."""
    config = _transformer_config(
        load_config(None, []), WeightMap(hf_config), world, choose_profile(EngineConfig(), setup_device())
    )
    assert config.moe_router_bias_update_rate == 0 and config.moe_aux_loss_coeff == 0
    assert config.moe_router_load_balancing_type == "none" and config.moe_z_loss_coeff is None
    router, routes = make_router("sigmoid"), random_routes()
    bias = router.expert_bias.clone()
    route(router, make_input(), routes, backward=upstream())
    assert torch.equal(router.local_tokens_per_expert, map_of(routes).sum(0).float())
    updated = get_updated_expert_bias(
        router.local_tokens_per_expert, router.expert_bias, config.moe_router_bias_update_rate
    )
    assert torch.equal(updated, bias) and not router.is_aux_loss_enabled()


# ---- the rest of the contract


@every_kind
def test_order_within_a_row_changes_only_rounding(kind):
    router, x, routes = make_router(kind), make_input(), random_routes()
    gates, chosen, _ = route(router, x, routes, backward=upstream())
    grad = router.weight.grad.clone()
    permuted, map_, _ = route(router, x, routes[:, [2, 0, 3, 1]], backward=upstream())
    assert torch.equal(map_, chosen)
    torch.testing.assert_close(permuted, gates, rtol=3e-7, atol=0)
    torch.testing.assert_close(router.weight.grad, grad, rtol=1e-5, atol=1e-6)


@every_kind
def test_missing_rows_are_routed_live(kind):
    router, x, routes = make_router(kind), make_input(), random_routes()
    present = torch.arange(ROWS) % 2 == 0
    live, live_map, _ = route(router, x)
    replayed, _, _ = route(router, x, routes)
    gates, chosen, _ = route(router, x, routes, present)
    assert torch.equal(gates, torch.where(present[:, None], replayed, live))
    assert torch.equal(chosen[~present], live_map[~present]) and torch.equal(chosen[present], map_of(routes)[present])


@every_kind
def test_comparing_replays_nothing(kind):
    """replay=False with routes: only the gap is taken; how far the other experts lie below the own choice."""
    router, x, routes = make_router(kind), make_input(), drifted_routes(make_router(kind), make_input())
    live, live_map, _ = route(router, x)
    with replay_schedule([[router]]) as replay, replay.forward(0, routes[:, None], replay=False) as record:
        gates, chosen = router(x)
    assert torch.equal(gates, live) and torch.equal(chosen, live_map)
    assert record.stacked()[1].max() > 0


@pytest.mark.parametrize("where", ["in a forward", "between forwards", "in a recompute"])
def test_nothing_is_left_after_an_exception(where):
    router, x, routes = make_router("softmax"), make_input(), random_routes()
    plain = router(x)[0].detach()
    runs = []

    def forward(a):
        runs.append(a)
        if where == "in a recompute" and len(runs) == 2:
            raise RuntimeError(where)
        return router(a)[0]

    with pytest.raises(RuntimeError), replay_schedule([[router]]) as replay:
        rows = ROWS - 1 if where == "in a forward" else ROWS  # one row of routes too few
        with replay.forward(0, routes[:rows, None], replay=True):
            out = checkpoint(forward, False, x.clone().requires_grad_())
        if where == "between forwards":
            raise RuntimeError(where)
        out.backward(upstream())
    assert len(runs) == (2 if where == "in a recompute" else 1)
    assert router.router_replay is None and torch.equal(router(x)[0], plain)
    assert torch.equal(route(router, x)[0], plain)


def test_without_replay_there_is_no_hook_on_the_path():
    router = make_router("softmax")
    assert router.router_replay is None and not router.config.moe_enable_routing_replay
