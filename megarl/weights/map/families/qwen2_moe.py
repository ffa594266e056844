"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biased QKV, softmax router, one shared
expert behind a sigmoid gate.
"""

from __future__ import annotations

from megarl.weights.map.families import common, unsupported
from megarl.weights.map.families.common import Hf
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


def refuse(hf: Hf) -> str | None:
    return unsupported.anywhere(hf) or unsupported.softmax_router(hf)


def family(hf: Hf) -> Family:
    width, shared = hf["moe_intermediate_size"], hf["shared_expert_intermediate_size"]
    bias = hf["qkv_bias"]
    router = common.softmax_router(hf, common.sparse_step_layers(hf), width, renormalised=hf["norm_topk_prob"])
    gate = {"mlp.shared_expert_gate.weight": (1, hf["hidden_size"])}
    return Family(
        model={
            **common.transformer(hf),
            **router,
            "add_qkv_bias": bias,
            "moe_shared_expert_intermediate_size": shared,
            "moe_shared_expert_gate": True,
        },
        gpt=common.gpt(hf),
        entries=(
            *common.ends(hf),
            *common.norms(hf),
            *common.attention(hf, qkv_bias=bias),
            *common.experts(hf, width),
            *common.gated_mlp(hf, shared, "mlp.shared_experts", "mlp.shared_expert", "moe"),
            common.row("mlp.shared_experts.gate_weight", Replicated(), gate, "moe"),
            *common.dense_mlp(hf),
        ),
    )
