"""Llama 2 and 3, dense: grouped-query attention, rope scaling of Llama 3.1 included. A control for the MoE families."""

from __future__ import annotations

from megarl.weights.map.families import common, unsupported
from megarl.weights.map.families.common import Hf
from megarl.weights.map.weight_map import Family

DEFAULTS = dict(num_key_value_heads=None)


def refuse(hf: Hf) -> str | None:
    return unsupported.anywhere(hf, scalings=("llama3",))


def family(hf: Hf) -> Family:
    return Family(
        model=common.transformer(hf),
        gpt=common.gpt(hf),
        entries=(*common.ends(hf), *common.norms(hf), *common.attention(hf), *common.dense_mlp(hf)),
    )
