"""What megarl cannot train, by the name of its key in config.json: each check gives one line or None."""

from __future__ import annotations

from typing import Any

from megarl.weights.map.families.common import HfConfig, rope_parameters


def anywhere(
    config: HfConfig,
    *,
    biased_output: str | None = "attention_bias",
    scalings: tuple[str, ...] = (),
    partial: bool = False,
) -> str | None:
    """One line for what megarl cannot train, or None.

    biased_output: the key that, when true, gives the attention's output a bias. scalings: kinds of
    rope scaling that the family has. partial: whether it may rotate a part of the head only.
    """
    full = "set it to false (or null) in config.json to train with full attention"
    return fault(
        (
            config.get("hidden_act", "silu") != "silu" and f"hidden_act {config.get('hidden_act')!r}",
            "use a model of SiLU",
        ),
        (
            biased_output and config.get(biased_output) and f"{biased_output} true",
            "Megatron's output projection has no bias",
        ),
        (config.get("mlp_bias") and "mlp_bias true", "use a checkpoint without biases in its MLPs"),
        (_window(config), full),
        (_rope_fault(config, scalings), "remove it from config.json to train within the original context"),
        (
            not partial and _partial_rotation(config),
            "transformers ignores it in this family, vLLM does not; remove it from config.json",
        ),
        (_quantization_fault(config), "dequantise the checkpoint first"),
    )


def fault(*pairs: tuple[Any, str]) -> str | None:
    """The first (what is not supported, what to do) whose first part holds, as one line."""
    return next((f"model.path: {what} is not supported; {fix}" for what, fix in pairs if what), None)


def softmax_router(config: HfConfig) -> str | None:
    """megatron-core refuses the softmax of one logit."""
    single = config["num_experts_per_tok"] == 1 and (config["model_type"] == "mixtral" or config["norm_topk_prob"])
    return fault(
        (
            single and "num_experts_per_tok 1 with renormalised gates",
            "every gate would be 1 and the router would not learn",
        )
    )


def sigmoid_router(config: HfConfig) -> str | None:
    groups, top_groups, top_k = config["n_group"] or 1, config["topk_group"] or 1, config["num_experts_per_tok"]
    ranked = top_groups < groups and top_k // top_groups != 2
    plain = config["norm_topk_prob"] == (top_k == 1)
    return fault(
        (
            config.get("scoring_func", "sigmoid") != "sigmoid" and f"scoring_func {config.get('scoring_func')!r}",
            "only sigmoid is",
        ),
        (
            config.get("topk_method", "noaux_tc") != "noaux_tc" and f"topk_method {config.get('topk_method')!r}",
            "only noaux_tc is",
        ),
        (config.get("moe_layer_freq", 1) != 1 and f"moe_layer_freq {config.get('moe_layer_freq')}", "only 1 is"),
        (
            plain and f"norm_topk_prob {config['norm_topk_prob']} with {top_k} experts a token",
            "megatron-core renormalises from two on",
        ),
        (
            ranked and f"topk_group {top_groups} of {groups} with {top_k} experts a token",
            "megatron-core ranks groups by their best two experts only where num_experts_per_tok is twice topk_group",
        ),
    )


def _window(config: HfConfig) -> str | None:
    if config.get("use_sliding_window"):
        return "use_sliding_window true"
    if "use_sliding_window" not in config and config.get("sliding_window"):
        return f"sliding_window {config['sliding_window']}"
    return "layer_types with 'sliding_attention'" if "sliding_attention" in (config.get("layer_types") or []) else None


def _rope_fault(config: HfConfig, scalings: tuple[str, ...]) -> str | None:
    rope = rope_parameters(config)
    if nested := next((key for key, value in rope.items() if isinstance(value, dict)), None):
        return f"rope_parameters of {nested!r} alone"
    kind = rope["rope_type"]
    if kind != "default" and kind not in scalings:
        return f"rope scaling {kind!r}"
    if kind == "llama3":  # the rest are constants in megatron-core (rotary_pos_embedding.py, _apply_scaling)
        fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
        wrong = next((key for key, value in fixed.items() if rope.get(key) != value), None)
    elif (
        kind == "yarn"
    ):  # attention_factor and truncate have no place in megatron-core; one mscale alone is no formula that all have
        wrong = next((key for key in ("attention_factor", "truncate") if rope.get(key) is not None), None)
        scale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        wrong = wrong or ("mscale_all_dim" if all_dim and not scale else None)
        wrong = wrong or ("mscale" if scale not in (None, 1) and not all_dim else None)
        wrong = wrong or ("factor" if not rope.get("factor") else None)
    else:
        wrong = None
    return f"rope scaling {kind!r} with {wrong} {rope.get(wrong)!r}" if wrong else None


def _partial_rotation(config: HfConfig) -> str | None:
    part = rope_parameters(config).get("partial_rotary_factor")
    return f"partial_rotary_factor {part}" if part not in (None, 1) else None


def _quantization_fault(config: HfConfig) -> str | None:
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method == "fp8" and quantization.get("weight_block_size"):
        return None
    return f"quantization_config with quant_method {method!r}{' without weight_block_size' if method == 'fp8' else ''}"
