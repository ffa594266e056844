"""Qwen3, dense: grouped-query attention with QK norm. A control for the MoE families."""

from __future__ import annotations

from megarl.weights.map.families import common, unsupported
from megarl.weights.map.families.common import Hf
from megarl.weights.map.weight_map import Family

DEFAULTS = dict(num_key_value_heads=32, head_dim=128, use_sliding_window=False)


def refuse(hf: Hf) -> str | None:
    return unsupported.anywhere(hf)


def family(hf: Hf) -> Family:
    return Family(
        model={**common.transformer(hf), "qk_layernorm": True},
        gpt=common.gpt(hf),
        entries=(*common.ends(hf), *common.norms(hf), *common.attention(hf, qk_norm=True), *common.dense_mlp(hf)),
    )
