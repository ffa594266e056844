"""What families share: keys of config.json in both transformers
generations, Megatron's configuration and rows of a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarl.weights.map.relations import GroupedQkv, Relation, Replicated, Split, Stacked, Vocabulary
from megarl.weights.map.weight_map import Entry
from megarl.weights.rect import Shape

Hf = dict[str, Any]
LAYER = "model.layers.{layer}."


def num_experts(hf: Hf) -> int:
    """transformers 4 and 5, and the families among themselves, name it differently."""
    return hf[
        next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in hf), "num_experts")
    ]


def head_dim(hf: Hf) -> int:
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def kv_heads(hf: Hf) -> int:
    return hf["num_key_value_heads"] or hf["num_attention_heads"]


def sparse_step_layers(hf: Hf) -> list[int]:
    """Qwen's MoE layers: every decoder_sparse_step-th, except mlp_only_layers."""
    dense, step = set(hf["mlp_only_layers"] or []), hf["decoder_sparse_step"]
    return [i for i in range(hf["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0]


# ---- Megatron's configuration


def transformer(hf: Hf) -> dict[str, Any]:
    """Keyword arguments of TransformerConfig for grouped-query attention and a dense MLP."""
    return dict(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=kv_heads(hf),
        kv_channels=head_dim(hf),
        ffn_hidden_size=hf["intermediate_size"],
        layernorm_epsilon=hf["rms_norm_eps"],
    )


def softmax_router(hf: Hf, moe_layers: list[int], width: int, *, renormalised: bool) -> dict[str, Any]:
    """Softmax over all experts, top-k, gates renormalised or not. Renormalised it is the
    softmax of the top-k logits.
    """
    return dict(
        num_moe_experts=num_experts(hf),
        moe_ffn_hidden_size=width,
        moe_router_topk=hf["num_experts_per_tok"],
        moe_router_score_function="softmax",
        moe_router_pre_softmax=not renormalised,
        moe_layer_freq=[int(i in moe_layers) for i in range(hf["num_hidden_layers"])],
    )


def sigmoid_router(hf: Hf) -> dict[str, Any]:
    """DeepSeek-V3's router: top-k of sigmoid + expert bias among the best
    groups, gates renormalised and scaled; shared experts beside it.

    megatron-core ranks a group by the sum of its best top_k // group_topk
    experts, the model by its best two: equal where that is two.
    """
    groups, kept = hf["n_group"] or 1, hf["topk_group"] or 1
    width = hf["moe_intermediate_size"]
    limit = dict(moe_router_num_groups=groups, moe_router_group_topk=kept) if kept < groups else {}
    shared = (hf["n_shared_experts"] or 0) * width
    return dict(
        num_moe_experts=num_experts(hf),
        moe_ffn_hidden_size=width,
        moe_router_topk=hf["num_experts_per_tok"],
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=hf["routed_scaling_factor"],
        moe_shared_expert_intermediate_size=shared or None,
        moe_layer_freq=[int(i >= hf["first_k_dense_replace"]) for i in range(hf["num_hidden_layers"])],
        **limit,
    )


def rope_parameters(hf: Hf) -> dict[str, Any]:
    """rope_type, rope_theta and the rest, whichever generation of keys holds them; rope_theta and
    partial_rotary_factor may be missing. Which key wins where several say it: as in transformers
    (modeling_rope_utils.py).
    """
    found = {key: hf[key] for key in ("rope_theta", "partial_rotary_factor") if hf.get(key) is not None}
    found |= hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    return {**found, "rope_type": found.get("rope_type", found.get("type", "default"))}


def gpt(hf: Hf, *, theta: float = 10_000.0, partial: float = 1.0) -> dict[str, Any]:
    """Keyword arguments of GPTModel. theta, partial: the family's defaults where config.json names none."""
    rope = rope_parameters(hf)
    scaling = (
        dict(rope_scaling=True, rope_scaling_factor=float(rope["factor"])) if rope["rope_type"] == "llama3" else {}
    )
    return dict(
        position_embedding_type="rope",
        rotary_base=rope.get("rope_theta", theta),
        rotary_percent=rope.get("partial_rotary_factor", partial),
        max_sequence_length=hf["max_position_embeddings"],
        **scaling,
    )


# ---- rows of a table


def row(
    name: str, relation: Relation, tensors: Mapping[str, Shape], where: Any = "layer", *, buffer: bool = False
) -> Entry:
    """A row inside a layer. `name` is relative to Megatron's layer, the tensors' names to Hugging Face's."""
    return Entry(
        f"decoder.layers.{{layer}}.{name}",
        tuple(LAYER + n for n in tensors),
        tuple(tensors.values()),
        relation,
        where,
        buffer,
    )


def ends(hf: Hf) -> tuple[Entry, ...]:
    """Embedding, final norm and output layer."""
    hidden, vocab = hf["hidden_size"], hf["vocab_size"]
    return (
        Entry(
            "embedding.word_embeddings.weight",
            ("model.embed_tokens.weight",),
            ((vocab, hidden),),
            Vocabulary(),
            "first",
        ),
        Entry("decoder.final_layernorm.weight", ("model.norm.weight",), ((hidden,),), Replicated(), "last"),
        Entry("output_layer.weight", ("lm_head.weight",), ((vocab, hidden),), Vocabulary(), "last"),
    )


def norms(hf: Hf) -> tuple[Entry, ...]:
    shape = (hf["hidden_size"],)
    return (
        row("input_layernorm.weight", Replicated(), {"input_layernorm.weight": shape}),
        row("pre_mlp_layernorm.weight", Replicated(), {"post_attention_layernorm.weight": shape}),
    )


def attention(hf: Hf, *, qk_norm: bool = False, qkv_bias: bool = False) -> tuple[Entry, ...]:
    """Grouped-query attention."""
    hidden, dim, heads, groups = hf["hidden_size"], head_dim(hf), hf["num_attention_heads"], kv_heads(hf)
    widths = {"q": heads * dim, "k": groups * dim, "v": groups * dim}
    qkv = GroupedQkv(groups, heads // groups, dim)
    rows = [
        row(
            "self_attention.linear_qkv.weight",
            qkv,
            {f"self_attn.{x}_proj.weight": (n, hidden) for x, n in widths.items()},
        )
    ]
    if qkv_bias:
        rows += [
            row("self_attention.linear_qkv.bias", qkv, {f"self_attn.{x}_proj.bias": (n,) for x, n in widths.items()})
        ]
    if qk_norm:
        rows += [
            row(f"self_attention.{x}_layernorm.weight", Replicated(), {f"self_attn.{x}_norm.weight": (dim,)})
            for x in "qk"
        ]
    return (
        *rows,
        row("self_attention.linear_proj.weight", Split(1), {"self_attn.o_proj.weight": (hidden, heads * dim)}),
    )


def gated_mlp(
    hf: Hf,
    width: int,
    name: str,
    tensors: str,
    where: Any,
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Entry, ...]:
    """down(silu(gate(x)) * up(x)): `name` in Megatron, `tensors` in Hugging Face, both relative to the layer."""
    hidden = hf["hidden_size"]
    gate, up, down = (f"{tensors}.{projection}.weight" for projection in projections)
    return (
        row(f"{name}.linear_fc1.weight", Stacked(), {gate: (width, hidden), up: (width, hidden)}, where),
        row(f"{name}.linear_fc2.weight", Split(1), {down: (hidden, width)}, where),
    )


def dense_mlp(hf: Hf) -> tuple[Entry, ...]:
    """The MLP of layers without experts."""
    return gated_mlp(hf, hf["intermediate_size"], "mlp", "mlp", "dense")


def experts(hf: Hf, width: int) -> tuple[Entry, ...]:
    """Router and routed experts."""
    router = {"mlp.gate.weight": (num_experts(hf), hf["hidden_size"])}
    return (
        row("mlp.router.weight", Replicated(), router, "moe"),
        *gated_mlp(hf, width, "mlp.experts.local_experts.{expert}", "mlp.experts.{expert}", "moe"),
    )


def sigmoid_experts(hf: Hf) -> tuple[Entry, ...]:
    """What `sigmoid_router` routes to: its bias, routed experts, the
    shared experts as one MLP, and the dense first layers.
    """
    width, shared = hf["moe_intermediate_size"], hf["n_shared_experts"] or 0
    bias = {"mlp.gate.e_score_correction_bias": (num_experts(hf),)}
    return (
        *experts(hf, width),
        row("mlp.router.expert_bias", Replicated(), bias, "moe", buffer=True),
        *(gated_mlp(hf, shared * width, "mlp.shared_experts", "mlp.shared_experts", "moe") if shared else ()),
        *dense_mlp(hf),
    )
