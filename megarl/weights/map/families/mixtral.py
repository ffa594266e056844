"""Mixtral (8x7B, 8x22B): grouped-query attention, experts in every
layer under names of their own, renormalised softmax router.
"""

from __future__ import annotations

from megarl.weights.map.families import common, unsupported
from megarl.weights.map.families.common import Hf
from megarl.weights.map.relations import Replicated
from megarl.weights.map.weight_map import Family

DEFAULTS = dict(num_key_value_heads=8)
MOE = "block_sparse_moe."


def refuse(hf: Hf) -> str | None:
    return unsupported.anywhere(hf) or unsupported.softmax_router(hf)


def family(hf: Hf) -> Family:
    width = hf["intermediate_size"]
    every = list(range(hf["num_hidden_layers"]))
    router = {MOE + "gate.weight": (common.num_experts(hf), hf["hidden_size"])}
    return Family(
        model={**common.transformer(hf), **common.softmax_router(hf, every, width, renormalised=True)},
        gpt=common.gpt(hf, theta=1e6),
        entries=(
            *common.ends(hf),
            *common.norms(hf),
            *common.attention(hf),
            common.row("mlp.router.weight", Replicated(), router, "moe"),
            *common.gated_mlp(
                hf,
                width,
                "mlp.experts.local_experts.{expert}",
                MOE + "experts.{expert}",
                "moe",
                projections=("w1", "w3", "w2"),
            ),
        ),
    )
