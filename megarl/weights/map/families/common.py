"""What families share: keys of config.json in both transformers
generations, Megatron's configuration and rows of a table. `config` is the model's config.json throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarl.weights.map.relations import GroupedQkv, Relation, Replicated, Split, Stacked, Vocabulary
from megarl.weights.map.weight_map import Entry
from megarl.weights.rect import Shape

HfConfig = dict[str, Any]
LAYER = "model.layers.{layer}."


def num_experts(config: HfConfig) -> int:
    """transformers 4 and 5, and the families among themselves, name it differently."""
    return config[
        next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config), "num_experts")
    ]


def head_dim(config: HfConfig) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def kv_heads(config: HfConfig) -> int:
    return config["num_key_value_heads"] or config["num_attention_heads"]


def sparse_step_layers(config: HfConfig) -> list[int]:
    """Qwen's MoE layers: every decoder_sparse_step-th, except mlp_only_layers."""
    dense, step = set(config["mlp_only_layers"] or []), config["decoder_sparse_step"]
    return [i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0]


# ---- Megatron's configuration


def transformer(config: HfConfig) -> dict[str, Any]:
    """Keyword arguments of TransformerConfig for grouped-query attention and a dense MLP."""
    return dict(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=kv_heads(config),
        kv_channels=head_dim(config),
        ffn_hidden_size=config["intermediate_size"],
        layernorm_epsilon=config["rms_norm_eps"],
    )


def softmax_router(config: HfConfig, moe_layers: list[int], width: int, *, renormalised: bool) -> dict[str, Any]:
    """Softmax over all experts, top-k, gates renormalised or not. Renormalised it is the
    softmax of the top-k logits.
    """
    return dict(
        num_moe_experts=num_experts(config),
        moe_ffn_hidden_size=width,
        moe_router_topk=config["num_experts_per_tok"],
        moe_router_score_function="softmax",
        moe_router_pre_softmax=not renormalised,
        moe_layer_freq=[int(i in moe_layers) for i in range(config["num_hidden_layers"])],
    )


def sigmoid_router(config: HfConfig) -> dict[str, Any]:
    """DeepSeek-V3's router: top-k of sigmoid + expert bias among the best
    groups, gates renormalised and scaled; shared experts beside it.

    megatron-core ranks a group by the sum of its best top_k // group_topk
    experts, the model by its best two: equal where that is two.
    """
    groups, top_groups = config["n_group"] or 1, config["topk_group"] or 1
    width = config["moe_intermediate_size"]
    limit = dict(moe_router_num_groups=groups, moe_router_group_topk=top_groups) if top_groups < groups else {}
    shared = (config["n_shared_experts"] or 0) * width
    return dict(
        num_moe_experts=num_experts(config),
        moe_ffn_hidden_size=width,
        moe_router_topk=config["num_experts_per_tok"],
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=config["routed_scaling_factor"],
        moe_shared_expert_intermediate_size=shared or None,
        moe_layer_freq=[int(i >= config["first_k_dense_replace"]) for i in range(config["num_hidden_layers"])],
        **limit,
    )


def rope_parameters(config: HfConfig) -> dict[str, Any]:
    """rope_type, rope_theta and the rest, whichever generation of keys holds them; rope_theta and
    partial_rotary_factor may be missing. Which key wins where several say it: as in transformers
    (modeling_rope_utils.py).
    """
    rope = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    rope |= config.get("rope_scaling") or config.get("rope_parameters") or {}
    return {**rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}


def gpt(config: HfConfig, *, theta: float = 10_000.0, partial: float = 1.0) -> dict[str, Any]:
    """Keyword arguments of GPTModel. theta, partial: the family's defaults where config.json names none."""
    rope = rope_parameters(config)
    scaling = (
        dict(rope_scaling=True, rope_scaling_factor=float(rope["factor"])) if rope["rope_type"] == "llama3" else {}
    )
    return dict(
        position_embedding_type="rope",
        rotary_base=rope.get("rope_theta", theta),
        rotary_percent=rope.get("partial_rotary_factor", partial),
        max_sequence_length=config["max_position_embeddings"],
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


def ends(config: HfConfig) -> tuple[Entry, ...]:
    """Embedding, final norm and output layer; under tie_word_embeddings the last is the first."""
    hidden, vocab, tied = config["hidden_size"], config["vocab_size"], bool(config.get("tie_word_embeddings"))
    embedding, shape = "model.embed_tokens.weight", (vocab, hidden)
    head = embedding if tied else "lm_head.weight"
    return (
        Entry("embedding.word_embeddings.weight", (embedding,), (shape,), Vocabulary(), "first"),
        Entry("decoder.final_layernorm.weight", ("model.norm.weight",), ((hidden,),), Replicated(), "last"),
        Entry("output_layer.weight", (head,), (shape,), Vocabulary(), "last", copy=tied),
    )


def norms(config: HfConfig) -> tuple[Entry, ...]:
    shape = (config["hidden_size"],)
    return (
        row("input_layernorm.weight", Replicated(), {"input_layernorm.weight": shape}),
        row("pre_mlp_layernorm.weight", Replicated(), {"post_attention_layernorm.weight": shape}),
    )


def attention(config: HfConfig, *, qk_norm: bool = False, qkv_bias: bool = False) -> tuple[Entry, ...]:
    """Grouped-query attention."""
    hidden, dim, heads, groups = (
        config["hidden_size"],
        head_dim(config),
        config["num_attention_heads"],
        kv_heads(config),
    )
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
    config: HfConfig,
    width: int,
    name: str,
    tensors: str,
    where: Any,
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Entry, ...]:
    """down(silu(gate(x)) * up(x)): `name` in Megatron, `tensors` in Hugging Face, both relative to the layer."""
    hidden = config["hidden_size"]
    gate, up, down = (f"{tensors}.{projection}.weight" for projection in projections)
    return (
        row(f"{name}.linear_fc1.weight", Stacked(), {gate: (width, hidden), up: (width, hidden)}, where),
        row(f"{name}.linear_fc2.weight", Split(1), {down: (hidden, width)}, where),
    )


def dense_mlp(config: HfConfig) -> tuple[Entry, ...]:
    """The MLP of layers without experts."""
    return gated_mlp(config, config["intermediate_size"], "mlp", "mlp", "dense")


def experts(config: HfConfig, width: int) -> tuple[Entry, ...]:
    """Router and routed experts."""
    router = {"mlp.gate.weight": (num_experts(config), config["hidden_size"])}
    return (
        row("mlp.router.weight", Replicated(), router, "moe"),
        *gated_mlp(config, width, "mlp.experts.local_experts.{expert}", "mlp.experts.{expert}", "moe"),
    )


def sigmoid_experts(config: HfConfig) -> tuple[Entry, ...]:
    """What `sigmoid_router` routes to: its bias, routed experts, the
    shared experts as one MLP, and the dense first layers.
    """
    width, shared = config["moe_intermediate_size"], config["n_shared_experts"] or 0
    bias = {"mlp.gate.e_score_correction_bias": (num_experts(config),)}
    return (
        *experts(config, width),
        row("mlp.router.expert_bias", Replicated(), bias, "moe", buffer=True),
        *(gated_mlp(config, shared * width, "mlp.shared_experts", "mlp.shared_experts", "moe") if shared else ()),
        *dense_mlp(config),
    )
