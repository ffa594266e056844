"""Qwen3-MoE (Qwen3-30B-A3B and its relatives): grouped-query attention with QK norm,
softmax router, no shared expert.
"""

from __future__ import annotations

from megarl.weights.map.families import common, unsupported
from megarl.weights.map.families.common import Hf
from megarl.weights.map.weight_map import Family

DEFAULTS = dict(
    num_key_value_heads=4,
    decoder_sparse_step=1,
    mlp_only_layers=None,
    norm_topk_prob=False,
    use_sliding_window=False,
)


def refuse(hf: Hf) -> str | None:
    shared = unsupported.fault(
        (
            hf.get("shared_expert_intermediate_size") and "shared_expert_intermediate_size",
            "transformers ignores it in this family, vLLM does not; remove it from config.json",
        )
    )
    return unsupported.anywhere(hf) or unsupported.softmax_router(hf) or shared


def family(hf: Hf) -> Family:
    width = hf["moe_intermediate_size"]
    router = common.softmax_router(hf, common.sparse_step_layers(hf), width, renormalised=hf["norm_topk_prob"])
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
