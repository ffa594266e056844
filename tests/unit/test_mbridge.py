"""mbridge 0.15.1 as a second opinion: for every parameter of every family the same tensors, bitwise, on every rank."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import megarl.engine.build  # noqa: F401  (megatron-core on a CPU, which mbridge imports)
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools import tiny_model  # noqa: E402

BRIDGES = {
    "qwen3_moe": "qwen3moe.Qwen3MoEBridge",
    "qwen2_moe": "qwen2moe.Qwen2MoEBridge",
    "mixtral": "mixtral.MixtralBridge",
    "deepseek_v3": "deepseek_v3.DeepseekV3Bridge",
    "moonlight": "deepseek_v3.DeepseekV3Bridge",
    "glm4_moe": "glm4moe.GLM4MoEBridge",
    "qwen3": "qwen3.Qwen3Bridge",
    "qwen3_tied": "qwen3.Qwen3Bridge",
    "llama": "llama.LLaMABridge",
}


def bridge_of(family: str, hf_config: Any, tp: int) -> Any:
    """The family's bridge without the model it would build: what it knows of names and tensors."""
    module, _, name = BRIDGES[family].rpartition(".")
    cls = getattr(importlib.import_module(f"mbridge.models.{module}"), name)
    bridge = cls.__new__(cls)
    bridge.hf_config, bridge.dtype, bridge.extra_args = hf_config, torch.float32, {}
    bridge.mpu = SimpleNamespace(tp_size=tp, etp_size=tp)
    bridge.config = SimpleNamespace(gated_linear_unit=True, num_layers=hf_config.num_hidden_layers)
    bridge.make_vocab_size_divisible_by = None
    return bridge


def transformer_engine_name(name: str, weight_map: WeightMap) -> str:
    """The name that a parameter of the local spec has in the Transformer Engine spec,
    which mbridge's tables are for.
    """
    layer = int(name.split(".")[2]) if ".layers." in name else 0
    name = re.sub(r"\.local_experts\.(\d+)\.(linear_fc[12])\.weight$", r".\2.weight\1", name)
    if weight_map.model.get("multi_latent_attention"):
        name = name.replace("kv_layernorm.weight", "linear_kv_up_proj.layer_norm_weight")
        name = name.replace(".q_layernorm.weight", ".linear_q_up_proj.layer_norm_weight")
    else:
        name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
    return (
        name
        if layer in weight_map.moe_layers
        else name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    )


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, etp=2, world=2), Layout(tp=4, etp=4, world=4)], ids=str)
@pytest.mark.parametrize("family", tiny_model.FAMILIES)
def test_every_parameter_is_what_mbridge_makes_of_it(family: str, layout: Layout) -> None:
    config = tiny_model.tiny_config(family, layers=2, kv_heads=4)
    weight_map = WeightMap(config.to_dict())
    if not weight_map.num_experts:
        layout = Layout(tp=layout.tp, world=layout.world)
    bridge = bridge_of(family, config, layout.tp)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in weight_map.hf_shapes.items()}
    used = set()
    for rank in range(layout.world):
        for param in weight_map.params(layout, layout.coord(rank)):
            ours = torch.zeros(param.shape)
            for piece in param.pieces:
                source = weights[piece.hf_name][piece.rect.slices]
                ours[piece.local.slices] = source
            name = transformer_engine_name(param.name, weight_map)
            names = bridge._weight_name_mapping_mcore_to_hf(name)
            assert set(names) == {piece.hf_name for piece in param.pieces}, name
            whole = bridge._weight_to_mcore_format(name, [weights[hf] for hf in names])
            assert torch.equal(ours, bridge._weight_split_across_tp(name, whole, ours, layout.tp)[rank]), name
            used |= set(names)
    assert used == set(weights)
