"""Qwen3, dense: grouped-query attention with QK norm. A control for the MoE families."""

from __future__ import annotations

from megarl.weights.map.families import common, unsupported
from megarl.weights.map.families.common import HfConfig
from megarl.weights.map.weight_map import Family

DEFAULTS = dict(num_key_value_heads=32, head_dim=128, use_sliding_window=False)


def refuse(config: HfConfig) -> str | None:
    return unsupported.anywhere(config)


def family(config: HfConfig) -> Family:
    return Family(
        model={**common.transformer(config), "qk_layernorm": True},
        gpt=common.gpt(config),
        entries=(
            *common.ends(config),
            *common.norms(config),
            *common.attention(config, qk_norm=True),
            *common.dense_mlp(config),
        ),
    )
