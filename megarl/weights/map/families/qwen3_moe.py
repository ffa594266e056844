"""Qwen3-MoE (Qwen3-30B-A3B and its relatives): grouped-query attention with QK norm,
softmax router, no shared expert.
"""

from __future__ import annotations

from megarl.weights.map.families import common, unsupported
from megarl.weights.map.families.common import Hf
from megarl.weights.map.weight_map import Family


def refuse(hf: Hf) -> str | None:
    return unsupported.anywhere(hf) or unsupported.softmax_router(hf)


def family(hf: Hf) -> Family:
    width = hf["moe_intermediate_size"]
    router = common.softmax_router(
        hf, common.sparse_step_layers(hf), width, renormalised=hf.get("norm_topk_prob", False)
    )
    return Family(
        model={**common.transformer(hf), **router, "qk_layernorm": True},
        gpt=common.gpt(hf),
        entries=(
            *common.ends(hf),
            *common.norms(hf),
            *common.attention(hf, qk_norm=True),
            *common.experts(hf, width),
            *common.dense_mlp(hf),
        ),
    )
