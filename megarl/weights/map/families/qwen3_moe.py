"""Qwen3-MoE (Qwen3-30B-A3B and its relatives): grouped-query attention with QK norm,
softmax router, no shared expert.
"""

from __future__ import annotations

from megarl.weights.map.families import common, unsupported
from megarl.weights.map.families.common import HfConfig
from megarl.weights.map.weight_map import Family

DEFAULTS = dict(
    num_key_value_heads=4,
    decoder_sparse_step=1,
    mlp_only_layers=None,
    norm_topk_prob=False,
    use_sliding_window=False,
)


def refuse(config: HfConfig) -> str | None:
    shared = unsupported.fault(
        (
            config.get("shared_expert_intermediate_size") and "shared_expert_intermediate_size",
            "transformers ignores it in this family, vLLM does not; remove it from config.json",
        )
    )
    return unsupported.anywhere(config) or unsupported.softmax_router(config) or shared


def family(config: HfConfig) -> Family:
    width = config["moe_intermediate_size"]
    router = common.softmax_router(
        config, common.sparse_step_layers(config), width, renormalised=config["norm_topk_prob"]
    )
    return Family(
        model={**common.transformer(config), **router, "qk_layernorm": True},
        gpt=common.gpt(config),
        entries=(
            *common.ends(config),
            *common.norms(config),
            *common.attention(config, qk_norm=True),
            *common.experts(config, width),
            *common.dense_mlp(config),
        ),
    )
