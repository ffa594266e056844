"""Routers of megatron-core in a world of one rank, their inputs and routes, and their formulas a second time."""

from __future__ import annotations

import pytest
import torch

from megarl.replay.context import replay_schedule

# isort: split
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
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
