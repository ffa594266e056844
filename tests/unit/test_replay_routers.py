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
from megarl.replay.routes import agreement, route_dtype
from megarl.weights.map.weight_map import WeightMap
from tests.unit.routers import (
    EXPERTS,
    HIDDEN,
    ROWS,
    SCALE,
    TOP_K,
    drifted_routes,
    every_kind,
    formula,
    live_routes,
    make_input,
    make_router,
    map_of,
    random_routes,
    route,
    upstream,
)
from tools.one_rank import one_rank

# isort: split
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from megatron.core.transformer.moe.router_replay import RouterReplay


@pytest.fixture(scope="module", autouse=True)
def world():
    yield one_rank()
    destroy_parallel()


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


def test_without_replay_there_is_no_hook_on_the_path():
    router = make_router("softmax")
    assert router.router_replay is None and not router.config.moe_enable_routing_replay


@every_kind
@pytest.mark.parametrize("recorded", [True, False])
def test_a_pass_without_gradients_orders_the_experts_as_one_with_them(monkeypatch, kind, recorded):
    """As pi_old and the update do. megatron-core 0.19 sorts only where gradients are on; so does every release here."""
    from megatron.core.transformer.moe import moe_utils

    def topk(scores, k, dim=-1, **_):  # without sorting a kernel may give any order: the worst
        values, chosen = torch.topk(scores, k, dim=dim)
        return (values, chosen) if torch.is_grad_enabled() else (values.flip(dim), chosen.flip(dim))

    monkeypatch.setattr(moe_utils.torch, "topk", topk)
    router, x = make_router(kind), make_input(rows=400)

    def run():
        if not recorded:
            return router(x)[0], torch.empty(0)
        gates, _, record = route(router, x)
        return gates, record.stacked()[0]

    with torch.no_grad():
        gates_old, chosen_old = run()
    gates, chosen = run()
    assert torch.equal(gates_old, gates) and torch.equal(chosen_old, chosen) and not gates_old.requires_grad
