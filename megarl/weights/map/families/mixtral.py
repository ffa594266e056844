"""Mixtral (8x7B, 8x22B): grouped-query attention, experts in every
layer under names of their own, renormalised softmax router.
"""

from __future__ import annotations

from megarl.weights.map.families import common, unsupported
from megarl.weights.map.families.common import HfConfig
from megarl.weights.map.relations import Replicated
from megarl.weights.map.weight_map import Family

DEFAULTS = dict(num_key_value_heads=8)
MOE = "block_sparse_moe."


def refuse(config: HfConfig) -> str | None:
    return unsupported.anywhere(config) or unsupported.softmax_router(config)


def family(config: HfConfig) -> Family:
    width = config["intermediate_size"]
    every = list(range(config["num_hidden_layers"]))
    router = {MOE + "gate.weight": (common.num_experts(config), config["hidden_size"])}
    return Family(
        model={**common.transformer(config), **common.softmax_router(config, every, width, renormalised=True)},
        gpt=common.gpt(config, theta=1e6),
        entries=(
            *common.ends(config),
            *common.norms(config),
            *common.attention(config),
            common.row("mlp.router.weight", Replicated(), router, "moe"),
            *common.gated_mlp(
                config,
                width,
                "mlp.experts.local_experts.{expert}",
                MOE + "experts.{expert}",
                "moe",
                projections=("w1", "w3", "w2"),
            ),
        ),
    )
