"""Qwen3-MoE (Qwen3-30B-A3B and its relatives): grouped-query attention with QK norm, softmax router, no shared expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megarl.weights.weight_map import Entry, grouped_qkv, replicated, split, stacked, vocabulary

LAYER = "model.layers.{layer}."
MCORE = "decoder.layers.{layer}."


def num_experts(hf: dict[str, Any]) -> int:
    return hf.get("num_experts") or hf["num_local_experts"]  # transformers 4 and 5 name it differently


def top_k(hf: dict[str, Any]) -> int:
    return hf["num_experts_per_tok"]


def moe_layers(hf: dict[str, Any]) -> list[int]:
    dense = set(hf.get("mlp_only_layers") or [])
    step = hf.get("decoder_sparse_step", 1)
    return [i for i in range(hf["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0]


def head_dim(hf: dict[str, Any]) -> int:
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def transformer_config(hf: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of megatron.core.transformer.TransformerConfig that the architecture decides."""
    moe = set(moe_layers(hf))
    return dict(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"],
        kv_channels=head_dim(hf),
        ffn_hidden_size=hf["intermediate_size"],
        layernorm_epsilon=hf["rms_norm_eps"],
        qk_layernorm=True,
        add_qkv_bias=bool(hf.get("attention_bias", False)),
        num_moe_experts=num_experts(hf),
        moe_ffn_hidden_size=hf["moe_intermediate_size"],
        moe_router_topk=hf["num_experts_per_tok"],
        moe_router_score_function="softmax",
        moe_router_pre_softmax=not hf.get("norm_topk_prob", False),
        moe_layer_freq=[int(i in moe) for i in range(hf["num_hidden_layers"])],
    )


def gpt_model(hf: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of megatron.core.models.gpt.GPTModel that the architecture decides."""
    rope = hf.get("rope_parameters") or {}
    base = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    return dict(position_embedding_type="rope", rotary_base=base, max_sequence_length=hf["max_position_embeddings"])


def hf_shapes(hf: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocab, dim = hf["hidden_size"], hf["vocab_size"], head_dim(hf)
    q, kv = hf["num_attention_heads"] * dim, hf["num_key_value_heads"] * dim
    moe = set(moe_layers(hf))
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(hf["num_hidden_layers"]):
        at = LAYER.format(layer=layer)
        yield at + "input_layernorm.weight", (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
        yield at + "self_attn.o_proj.weight", (hidden, q)
        yield at + "self_attn.q_norm.weight", (dim,)
        yield at + "self_attn.k_norm.weight", (dim,)
        yield at + "post_attention_layernorm.weight", (hidden,)
        if layer in moe:
            yield at + "mlp.gate.weight", (num_experts(hf), hidden)
        width = hf["moe_intermediate_size"] if layer in moe else hf["intermediate_size"]
        for mlp in [f"mlp.experts.{e}." for e in range(num_experts(hf))] if layer in moe else ["mlp."]:
            yield at + mlp + "gate_proj.weight", (width, hidden)
            yield at + mlp + "up_proj.weight", (width, hidden)
            yield at + mlp + "down_proj.weight", (hidden, width)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def table(hf: dict[str, Any], padded_vocab: int) -> list[Entry]:
    groups = hf["num_key_value_heads"]
    qkv = grouped_qkv(groups, hf["num_attention_heads"] // groups, head_dim(hf))
    attention, mlp = "self_attention.", "mlp."
    expert = "mlp.experts.local_experts.{expert}."

    def row(name: str, relation: Any, *names: str) -> Entry:
        return Entry(MCORE + name, tuple(LAYER + n for n in names), relation)

    return [
        Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary(padded_vocab), "first"),
        row("input_layernorm.weight", replicated, "input_layernorm.weight"),
        row(attention + "linear_qkv.weight", qkv, *(f"self_attn.{x}_proj.weight" for x in "qkv")),
        row(attention + "linear_proj.weight", split(1), "self_attn.o_proj.weight"),
        row(attention + "q_layernorm.weight", replicated, "self_attn.q_norm.weight"),
        row(attention + "k_layernorm.weight", replicated, "self_attn.k_norm.weight"),
        row("pre_mlp_layernorm.weight", replicated, "post_attention_layernorm.weight"),
        row("mlp.router.weight", replicated, "mlp.gate.weight"),
        row(expert + "linear_fc1.weight", stacked, "mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
        row(expert + "linear_fc2.weight", split(1), "mlp.experts.{expert}.down_proj.weight"),
        row(mlp + "linear_fc1.weight", stacked, "mlp.gate_proj.weight", "mlp.up_proj.weight"),
        row(mlp + "linear_fc2.weight", split(1), "mlp.down_proj.weight"),
        Entry("decoder.final_layernorm.weight", ("model.norm.weight",), replicated, "last"),
        Entry("output_layer.weight", ("lm_head.weight",), vocabulary(padded_vocab), "last"),
    ]
