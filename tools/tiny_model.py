"""A seeded checkpoint of about 0.5M parameters and its tokenizer, one token a character.

python tools/tiny_model.py --out DIR [--family qwen3_moe]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789= +-*/:,.?\n"
FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "moonlight", "glm4_moe", "qwen3", "qwen3_tied", "llama")


def tiny_config(
    family: str = "qwen3_moe",
    *,
    vocab_size: int | None = None,
    layers: int = 4,
    hidden: int = 64,
    experts: int = 8,
    top_k: int = 2,
    moe_intermediate: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    dtype: str = "float32",
    initializer_range: float = 0.08,
    changes: dict[str, Any] | None = None,
) -> PreTrainedConfig:
    """transformers' configuration of the tiny model of `family`, one of FAMILIES.
    changes: further keys of config.json.
    """
    from transformers import AutoConfig

    latent = family in ("deepseek_v3", "moonlight")
    sizes: dict[str, Any] = dict(
        vocab_size=vocab_size or 32,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads if latent else kv_heads,
        **({} if latent else {"head_dim": head_dim}),
        **_of_family(family, experts, top_k, moe_intermediate, head_dim),
        max_position_embeddings=1024,
        tie_word_embeddings=family == "qwen3_tied",
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<eos>"),
        pad_token_id=SPECIAL.index("<pad>"),
        dtype=dtype,
    )
    model_type = {"moonlight": "deepseek_v3", "qwen3_tied": "qwen3"}.get(family, family)
    return AutoConfig.for_model(model_type, **(sizes | (changes or {})))


def make_tiny_model(out: str | Path, family: str = "qwen3_moe", *, seed: int = 0, **sizes: Any) -> Path:
    """Writes config.json, safetensors and a fast tokenizer into `out`; the same arguments give the same bytes.

    sizes: as in `tiny_config`. Norm weights lie off 1, biases off 0, and router weights are scaled up, so that a
    swapped or unloaded tensor shows and routing is not near-tied. The caller's torch RNG is left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM

    out = Path(out)
    config = tiny_config(family, **sizes)
    dtype = config.dtype  # from_config overwrites it
    tokenizer = make_tokenizer(config.vocab_size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith("mlp.gate.weight"):
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
        biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
        for buffer in biases.values():
            buffer.normal_(0, 0.1)
    model.to(dtype)
    for name, buffer in biases.items():
        model.get_submodule(
            name.rpartition(".")[0]
        ).e_score_correction_bias = buffer  # float32, as the families publish it
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _of_family(family: str, experts: int, top_k: int, width: int, head_dim: int) -> dict[str, Any]:
    """Keys of config.json that only some families have."""
    qwen = dict(
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    groups = max(1, top_k // 2)  # the only ratio that megatron-core has
    shared = dict(
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        n_group=2 * groups,
        topk_group=groups,
        num_nextn_predict_layers=0,
    )
    latent = dict(
        q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=head_dim, qk_rope_head_dim=head_dim, v_head_dim=head_dim
    )
    latent |= dict(scoring_func="sigmoid", topk_method="noaux_tc")  # transformers has no other; vLLM must be told
    yarn = dict(
        rope_type="yarn",
        rope_theta=10000.0,
        factor=4.0,
        original_max_position_embeddings=256,
        mscale=1.0,
        mscale_all_dim=0.7,
    )
    one_group = dict(n_group=1, topk_group=1)
    return {
        "qwen3_moe": qwen,
        "qwen2_moe": {**qwen, "norm_topk_prob": False, "shared_expert_intermediate_size": 2 * width},
        "mixtral": dict(num_local_experts=experts, num_experts_per_tok=top_k, sliding_window=None),
        "deepseek_v3": {**shared, **latent, "rope_parameters": yarn},
        "moonlight": {**shared, **one_group, **latent, "q_lora_rank": None, "n_shared_experts": 2},
        "glm4_moe": {**shared, **one_group, "attention_bias": True, "use_qk_norm": True},
        "qwen3": {},
        "qwen3_tied": {},
        "llama": {},
    }[family]


def character_tokenizer(vocab_size: int = 32) -> Tokenizer:
    """One token a character of CHARACTERS, padded with <x0>, <x1>, ... to `vocab_size`; no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*SPECIAL, *CHARACTERS]
    if vocab_size < len(words):
        raise ValueError(f"vocab_size {vocab_size} is below {len(words)}, the special tokens and characters")
    words += [f"<x{i}>" for i in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def make_tokenizer(vocab_size: int = 32) -> PreTrainedTokenizerFast:
    """`character_tokenizer` as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=character_tokenizer(vocab_size),
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--family", choices=FAMILIES, default=FAMILIES[0])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(make_tiny_model(arguments.out, arguments.family, seed=arguments.seed))
