"""A seeded Qwen3-MoE checkpoint of about 0.5M parameters and its tokenizer, one token a character: python tools/tiny_model.py --out DIR."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789= +-*/:,.?\n"


def make_tiny_model(
    out: str | Path,
    *,
    seed: int = 0,
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
) -> Path:
    """Writes config.json, safetensors and a fast tokenizer into `out`; the same arguments give the same bytes.

    Norm weights lie off 1 and router weights are scaled up, so that a swapped or unloaded tensor shows and routing is not near-tied.
    The caller's torch RNG is left as it was.
    """
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    out = Path(out)
    tokenizer = make_tokenizer(vocab_size or 32)
    config = Qwen3MoeConfig(
        vocab_size=vocab_size or 32,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=moe_intermediate,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith("mlp.gate.weight"):
                parameter.mul_(4.0)
    model.to(getattr(torch, dtype)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def make_tokenizer(vocab_size: int = 32) -> PreTrainedTokenizerFast:
    """A transformers fast tokenizer: one token a character of CHARACTERS, padded with <x0>, <x1>, ... to `vocab_size`; no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *CHARACTERS]
    if vocab_size < len(words):
        raise ValueError(f"vocab_size {vocab_size} is below {len(words)}, the special tokens and characters")
    words += [f"<x{i}>" for i in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(make_tiny_model(arguments.out, seed=arguments.seed))
