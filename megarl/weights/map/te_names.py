"""Names of parameters under Transformer Engine's layer spec, from those of the weight map (megatron-core's local spec).

Two things differ: a norm that feeds a linear layer is a parameter of that layer, and grouped experts are numbered
weights of one module (megatron-core, models/gpt/gpt_layer_specs.py and extensions/transformer_engine.py). The map
itself, shapes and pieces, stays the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection

FUSED_NORMS = {  # norm -> the linear layer it is fused into, where the layer has one by that name
    "input_layernorm": "self_attention.linear_qkv",
    "pre_mlp_layernorm": "mlp.linear_fc1",  # dense layers only: the router of a MoE layer needs the normed input too
}
_NORM = re.compile(rf"(.*layers\.\d+\.)({'|'.join(map(re.escape, FUSED_NORMS))})\.weight")
_EXPERT = re.compile(r"(.*\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.weight")


def transformer_engine_names(names: Collection[str], grouped_experts: bool) -> dict[str, str]:
    """Name in the map -> name in the model, for all parameters of one model chunk."""
    present = set(names)

    def rename(name: str) -> str:
        if norm := _NORM.fullmatch(name):
            linear = norm[1] + FUSED_NORMS[norm[2]]
            return f"{linear}.layer_norm_weight" if f"{linear}.weight" in present else name
        if grouped_experts and (expert := _EXPERT.fullmatch(name)):
            return f"{expert[1]}.{expert[3]}.weight{expert[2]}"
        return name

    return {name: rename(name) for name in names}
