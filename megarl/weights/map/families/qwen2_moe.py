"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biased QKV, softmax router, one shared
expert behind a sigmoid gate.
"""

from __future__ import annotations

from megarl.weights.map.families import common, unsupported
from megarl.weights.map.families.common import HfConfig
from megarl.weights.map.relations import Replicated
from megarl.weights.map.weight_map import Family

DEFAULTS = dict(
    num_key_value_heads=16,
    decoder_sparse_step=1,
    mlp_only_layers=None,
    norm_topk_prob=False,
    qkv_bias=True,
    use_sliding_window=False,
)


def refuse(config: HfConfig) -> str | None:
    return unsupported.anywhere(config) or unsupported.softmax_router(config)


def family(config: HfConfig) -> Family:
    width, shared = config["moe_intermediate_size"], config["shared_expert_intermediate_size"]
    bias = config["qkv_bias"]
    router = common.softmax_router(
        config, common.sparse_step_layers(config), width, renormalised=config["norm_topk_prob"]
    )
    gate = {"mlp.shared_expert_gate.weight": (1, config["hidden_size"])}
    return Family(
        model={
            **common.transformer(config),
            **router,
            "add_qkv_bias": bias,
            "moe_shared_expert_intermediate_size": shared,
            "moe_shared_expert_gate": True,
        },
        gpt=common.gpt(config),
        entries=(
            *common.ends(config),
            *common.norms(config),
            *common.attention(config, qkv_bias=bias),
            *common.experts(config, width),
            *common.gated_mlp(config, shared, "mlp.shared_experts", "mlp.shared_expert", "moe"),
            common.row("mlp.shared_experts.gate_weight", Replicated(), gate, "moe"),
            *common.dense_mlp(config),
        ),
    )
