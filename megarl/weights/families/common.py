"""What families share: keys of config.json in both transformers generations, rows of a table, and what no family supports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarl.weights.relations import GroupedQkv, Relation, Replicated, Shape, Split, Stacked, Vocabulary
from megarl.weights.weight_map import Entry

Hf = dict[str, Any]
LAYER = "model.layers.{layer}."


def num_experts(hf: Hf) -> int:
    """transformers 4 and 5, and the families among themselves, name it differently."""
    return hf[next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in hf), "num_experts")]


def head_dim(hf: Hf) -> int:
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def kv_heads(hf: Hf) -> int:
    return hf.get("num_key_value_heads") or hf["num_attention_heads"]


def sparse_step_layers(hf: Hf) -> list[int]:
    """Qwen's MoE layers: every decoder_sparse_step-th, except mlp_only_layers."""
    dense = set(hf.get("mlp_only_layers") or [])
    step = hf.get("decoder_sparse_step", 1)
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
    """Softmax over all experts, top-k, gates renormalised or not. Renormalised it is the softmax of the top-k logits."""
    return dict(
        num_moe_experts=num_experts(hf),
        moe_ffn_hidden_size=width,
        moe_router_topk=hf["num_experts_per_tok"],
        moe_router_score_function="softmax",
        moe_router_pre_softmax=not renormalised,
        moe_layer_freq=[int(i in moe_layers) for i in range(hf["num_hidden_layers"])],
    )


def rope_parameters(hf: Hf) -> dict[str, Any]:
    """rope_type, rope_theta and the rest, whichever generation of keys holds them; rope_theta and partial_rotary_factor may be missing."""
    found = {key: hf[key] for key in ("rope_theta", "partial_rotary_factor") if hf.get(key) is not None}
    found |= hf.get("rope_scaling") or {}
    found |= hf.get("rope_parameters") or {}
    return {**found, "rope_type": found.get("rope_type", found.get("type", "default"))}


def gpt(hf: Hf, *, theta: float = 10_000.0, partial: float = 1.0) -> dict[str, Any]:
    """Keyword arguments of GPTModel. theta, partial: the family's defaults where config.json names none."""
    rope = rope_parameters(hf)
    scaling = dict(rope_scaling=True, rope_scaling_factor=float(rope["factor"])) if rope["rope_type"] == "llama3" else {}
    return dict(
        position_embedding_type="rope",
        rotary_base=rope.get("rope_theta", theta),
        rotary_percent=rope.get("partial_rotary_factor", partial),
        max_sequence_length=hf["max_position_embeddings"],
        **scaling,
    )


# ---- rows of a table


def row(name: str, relation: Relation, tensors: Mapping[str, Shape], where: Any = "layer", *, buffer: bool = False) -> Entry:
    """A row inside a layer. `name` is relative to Megatron's layer, the tensors' names to Hugging Face's."""
    return Entry(f"decoder.layers.{{layer}}.{name}", tuple(LAYER + n for n in tensors), tuple(tensors.values()), relation, where, buffer)


def ends(hf: Hf) -> tuple[Entry, ...]:
    """Embedding, final norm and output layer."""
    hidden, vocab = hf["hidden_size"], hf["vocab_size"]
    return (
        Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ((vocab, hidden),), Vocabulary(), "first"),
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
    rows = [row("self_attention.linear_qkv.weight", qkv, {f"self_attn.{x}_proj.weight": (n, hidden) for x, n in widths.items()})]
    if qkv_bias:
        rows += [row("self_attention.linear_qkv.bias", qkv, {f"self_attn.{x}_proj.bias": (n,) for x, n in widths.items()})]
    if qk_norm:
        rows += [row(f"self_attention.{x}_layernorm.weight", Replicated(), {f"self_attn.{x}_norm.weight": (dim,)}) for x in "qk"]
    return (*rows, row("self_attention.linear_proj.weight", Split(1), {"self_attn.o_proj.weight": (hidden, heads * dim)}))


def gated_mlp(
    hf: Hf, width: int, name: str, tensors: str, where: Any, projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
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


# ---- what no family supports


def refuse(hf: Hf, *, biased_output: str | None = "attention_bias") -> str | None:
    """One line for what megarl cannot train, or None. biased_output: the key that, when true, adds a bias to the attention's output."""
    rope = rope_parameters(hf)
    faults = (
        (hf.get("hidden_act", "silu") != "silu", f"hidden_act {hf.get('hidden_act')!r}", "only silu is"),
        (hf.get("tie_word_embeddings"), "tie_word_embeddings true", "use a checkpoint that has its own lm_head.weight"),
        (biased_output and hf.get(biased_output), f"{biased_output} true", "Megatron's output projection has no bias"),
        (hf.get("mlp_bias"), "mlp_bias true", "use a checkpoint without biases in its MLPs"),
        (_window(hf), _window(hf), "set it to false (or null) in config.json to train with full attention"),
        (_rope_fault(rope), _rope_fault(rope), "remove it from config.json to train within the original context"),
        (_quantization_fault(hf), _quantization_fault(hf), "dequantise the checkpoint first"),
    )
    return next((f"model.path: {what} is not supported; {fix}" for wrong, what, fix in faults if wrong), None)


def _window(hf: Hf) -> str | None:
    if hf.get("use_sliding_window"):
        return "use_sliding_window true"
    if "use_sliding_window" not in hf and hf.get("sliding_window"):
        return f"sliding_window {hf['sliding_window']}"
    return "layer_types with 'sliding_attention'" if "sliding_attention" in (hf.get("layer_types") or []) else None


def _rope_fault(rope: dict[str, Any]) -> str | None:
    kind = rope["rope_type"]
    if kind == "llama3":
        fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}  # megatron-core's constants
        wrong = next((key for key, value in fixed.items() if rope.get(key) != value), None)
        return f"rope scaling 'llama3' with {wrong} {rope.get(wrong)!r}" if wrong else None
    return None if kind == "default" else f"rope scaling {kind!r}"


def _quantization_fault(hf: Hf) -> str | None:
    quantization = hf.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method == "fp8" and quantization.get("weight_block_size"):
        return None
    return f"quantization_config with quant_method {method!r}{' without weight_block_size' if method == 'fp8' else ''}"
