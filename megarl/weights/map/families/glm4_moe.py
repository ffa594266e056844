"""GLM-4.5 and GLM-4.5-Air: partial rotary embedding, optional QK norm
and QKV bias, DeepSeek-V3's router, dense first layers.
"""

from __future__ import annotations

from megarl.weights.map.families import common, unsupported
from megarl.weights.map.families.common import HfConfig
from megarl.weights.map.weight_map import Family

DEFAULTS = dict(
    num_key_value_heads=8,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    attention_bias=False,
    use_qk_norm=False,
)


def refuse(config: HfConfig) -> str | None:
    return unsupported.anywhere(config, biased_output=None, partial=True) or unsupported.sigmoid_router(config)


def family(config: HfConfig) -> Family:
    bias, norm = bool(config["attention_bias"]), bool(config["use_qk_norm"])
    return Family(
        model={
            **common.transformer(config),
            **common.sigmoid_router(config),
            "add_qkv_bias": bias,
            "qk_layernorm": norm,
        },
        gpt=common.gpt(config, partial=0.5),
        entries=(
            *common.ends(config),
            *common.norms(config),
            *common.attention(config, qk_norm=norm, qkv_bias=bias),
            *common.sigmoid_experts(config),
        ),
    )
