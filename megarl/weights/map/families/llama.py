"""Llama 2 and 3, dense: grouped-query attention, rope scaling of Llama 3.1 included. A control for the MoE families."""

from __future__ import annotations

from megarl.weights.map.families import common, unsupported
from megarl.weights.map.families.common import HfConfig
from megarl.weights.map.weight_map import Family

DEFAULTS = dict(num_key_value_heads=None)


def refuse(config: HfConfig) -> str | None:
    return unsupported.anywhere(config, scalings=("llama3",))


def family(config: HfConfig) -> Family:
    return Family(
        model=common.transformer(config),
        gpt=common.gpt(config),
        entries=(*common.ends(config), *common.norms(config), *common.attention(config), *common.dense_mlp(config)),
    )
