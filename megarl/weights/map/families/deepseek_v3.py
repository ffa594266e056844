"""DeepSeek-V3, R1, Moonlight, Kimi-K2: latent attention (with and
without a low-rank query), DeepSeek's router, dense first layers.
"""

from __future__ import annotations

from typing import Any

from megarl.weights.map.families import common, unsupported
from megarl.weights.map.families.common import HfConfig, row
from megarl.weights.map.relations import Replicated, Split
from megarl.weights.map.weight_map import Entry, Family

DEFAULTS = dict(
    num_key_value_heads=128,
    q_lora_rank=1536,
    n_shared_experts=1,
    n_group=8,
    topk_group=4,
    norm_topk_prob=True,
)


def refuse(config: HfConfig) -> str | None:
    halves = unsupported.fault(
        (config.get("rope_interleave") is False and "rope_interleave false", "megatron-core's MLA rotates neighbours")
    )
    return unsupported.anywhere(config, scalings=("yarn",)) or unsupported.sigmoid_router(config) or halves


def family(config: HfConfig) -> Family:
    return Family(
        model={**common.transformer(config), **_latent_attention(config), **common.sigmoid_router(config)},
        gpt=dict(position_embedding_type="rope", max_sequence_length=config["max_position_embeddings"]),
        entries=(*common.ends(config), *common.norms(config), *_attention(config), *common.sigmoid_experts(config)),
    )


def _latent_attention(config: HfConfig) -> dict[str, Any]:
    """Keyword arguments of MLATransformerConfig. Without mscale keys
    YaRN scales by its default; with them, by their quotient.
    """
    rope = common.rope_parameters(config)
    yarn: dict[str, Any] = {}
    if rope["rope_type"] == "yarn":
        yarn = dict(
            rotary_scaling_factor=rope["factor"],
            original_max_position_embeddings=rope.get(
                "original_max_position_embeddings", config["max_position_embeddings"]
            ),
            beta_fast=rope.get("beta_fast") or 32,
            beta_slow=rope.get("beta_slow") or 1,
            mscale=rope.get("mscale") or 1.0 if rope.get("mscale_all_dim") else 1.0,
            mscale_all_dim=rope.get("mscale_all_dim") or 0.0,
        )
    return dict(
        multi_latent_attention=True,
        num_query_groups=config["num_attention_heads"],
        kv_channels=config["v_head_dim"],
        q_lora_rank=config["q_lora_rank"],
        kv_lora_rank=config["kv_lora_rank"],
        qk_head_dim=config["qk_nope_head_dim"],
        qk_pos_emb_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
        rope_type="yarn" if yarn else "rope",
        rotary_base=rope.get("rope_theta", 10_000.0),
        **yarn,
    )


def _attention(config: HfConfig) -> tuple[Entry, ...]:
    """Down projections are whole on every rank (megarl/engine/mla.py); vLLM replicates them too."""
    hidden, heads, lora = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    query, rotary = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]), config["qk_rope_head_dim"]
    key_value, value = heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), heads * config["v_head_dim"]
    if (rank := config["q_lora_rank"]) is None:
        queries = [row("self_attention.linear_q_proj.weight", Split(0), {"self_attn.q_proj.weight": (query, hidden)})]
    else:
        queries = [
            row(
                "self_attention.linear_q_down_proj.weight", Replicated(), {"self_attn.q_a_proj.weight": (rank, hidden)}
            ),
            row("self_attention.q_layernorm.weight", Replicated(), {"self_attn.q_a_layernorm.weight": (rank,)}),
            row("self_attention.linear_q_up_proj.weight", Split(0), {"self_attn.q_b_proj.weight": (query, rank)}),
        ]
    return (
        *queries,
        row(
            "self_attention.linear_kv_down_proj.weight",
            Replicated(),
            {"self_attn.kv_a_proj_with_mqa.weight": (lora + rotary, hidden)},
        ),
        row("self_attention.kv_layernorm.weight", Replicated(), {"self_attn.kv_a_layernorm.weight": (lora,)}),
        row("self_attention.linear_kv_up_proj.weight", Split(0), {"self_attn.kv_b_proj.weight": (key_value, lora)}),
        row("self_attention.linear_proj.weight", Split(1), {"self_attn.o_proj.weight": (hidden, value)}),
    )
