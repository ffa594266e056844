"""What a slice of Qwen3-30B-A3B must compute and move, and the times
that follow from a card's ceilings: python -m tools.bench.gpu.roofline

Rates are ceilings seen on such cards: a large bf16 matrix product, a large device-to-device copy counting bytes read
and written.
Every line of the table is arithmetic; none is a measurement.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megarl.estimate.roofline import ATTENTION, CARDS, MATRIX, Card

MODELS = Path(__file__).resolve().parents[3] / "examples" / "multi_node" / "models"
QWEN3_30B_A3B: dict[str, Any] = json.loads((MODELS / "Qwen3-30B-A3B" / "config.json").read_text(encoding="utf-8"))
PEAK = CARDS["h100"].peak  # FLOP/s, dense bf16, data sheet of H100 SXM and H200: what MFU divides by
STATE_BYTES = 18  # a parameter: bf16 weight 2, float32 gradient 4, float32 master, exp_avg and exp_avg_sq 12


def layer_parameters(hf: dict[str, Any]) -> tuple[int, int]:
    """(all, active for one token) of one MoE layer."""
    hidden, heads, groups, dim = (
        hf[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    attention = hidden * dim * (2 * heads + 2 * groups)
    expert, router = 3 * hidden * hf["moe_intermediate_size"], hidden * hf["num_experts"]
    return attention + router + hf["num_experts"] * expert, attention + router + hf["num_experts_per_tok"] * expert


def head_parameters(hf: dict[str, Any]) -> int:
    return hf["vocab_size"] * hf["hidden_size"]


def forward_flops(hf: dict[str, Any], sequence: int) -> tuple[float, float]:
    """(one layer, output layer) a token in sequences of this length;
    causal: half of the square. Training is 3 times this.
    """
    scores = 2 * 2 * (sequence / 2) * hf["num_attention_heads"] * hf["head_dim"]
    return 2 * layer_parameters(hf)[1] + scores, 2 * head_parameters(hf)


def training_flops(hf: dict[str, Any], layers: int, sequence: int) -> float:
    """A token, forward and backward, without recompute."""
    layer, head = forward_flops(hf, sequence)
    return 3 * (layers * layer + head)


def layers_that_fit(hf: dict[str, Any], tokens: int, memory: float) -> int:
    """Layers whose training state and activations fit beside embeddings, logits and their gradient (bf16)."""
    fixed = 2 * head_parameters(hf) * STATE_BYTES + 2 * 2 * tokens * hf["vocab_size"] + 6e9
    top, hidden, width = hf["num_experts_per_tok"], hf["hidden_size"], hf["moe_intermediate_size"]
    activations = 2 * (
        3 * top * hidden + 2 * top * width + 14 * hidden + 2 * hf["head_dim"] * hf["num_attention_heads"]
    )  # saved, a token
    each = layer_parameters(hf)[0] * STATE_BYTES + tokens * activations
    return max(1, min(hf["num_hidden_layers"], int((memory - fixed) / each)))


def layer_times(hf: dict[str, Any], tokens: int, sequence: int, card: Card) -> dict[str, float]:
    """Predicted seconds of one layer's forward and backward, by what
    bounds each part. Matrix products at 75% of the card's rate.
    """
    hidden, width, experts, top = (
        hf[k] for k in ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok")
    )
    rows = tokens * top
    matmul = MATRIX * card.matmul
    expert_weights = experts * 3 * hidden * width
    dense = layer_parameters(hf)[1] - top * 3 * hidden * width - hidden * experts
    attention_flops = (
        3.5 * tokens * 2 * sequence * hf["num_attention_heads"] * hf["head_dim"]
    )  # backward is 2.5 forwards
    expert_flops = 6 * tokens * top * 3 * hidden * width
    return {
        "attention projections": 6 * tokens * dense / matmul,
        "attention kernel": attention_flops / (ATTENTION * card.matmul),
        "expert products": max(expert_flops / matmul, 3 * 2 * expert_weights / card.copy),
        "expert gradients into float32": expert_weights * (2 + 2 + 4 + 4) / card.copy,  # written in bf16, read, added
        "router in float32": 6 * tokens * hidden * experts / 50e12 + 3 * tokens * hidden * 8 / card.copy,
        "rows to experts and back": 2
        * 2
        * rows
        * hidden
        * 2
        * 2
        / card.copy,  # permute and unpermute, forward and backward
        "activation between the products": rows * width * 2 * (3 + 8) / card.copy,
        "norms, rotation, residuals": tokens * hidden * 2 * 40 / card.copy,
    }


def step_prediction(hf: dict[str, Any], tokens: int, sequence: int, card: Card) -> dict[str, Any]:
    layers = layers_that_fit(hf, tokens, card.memory)
    parts = layer_times(hf, tokens, sequence, card)
    layer, head = forward_flops(hf, sequence)
    vocabulary = 2 * tokens * hf["vocab_size"]
    head_s = (
        3 * tokens * head / (0.85 * card.matmul)
        + vocabulary * (3 + 3) / card.copy
        + head_parameters(hf) * 12 / card.copy
    )
    layer_s = sum(parts.values())
    total = layers * layer_s + head_s
    parameters = layers * layer_parameters(hf)[0] + 2 * head_parameters(hf)
    return {
        "card": card.name,
        "tokens": tokens,
        "layers": layers,
        "layer_ms": {name: 1e3 * seconds for name, seconds in parts.items()},
        "layer_total_ms": 1e3 * layer_s,
        "head_ms": 1e3 * head_s,
        "tokens_per_s": tokens / total,
        "mfu": tokens * training_flops(hf, layers, sequence) / total / PEAK,
        "mfu_of_layers": 3 * tokens * layer / layer_s / PEAK,
        "mfu_of_48_layers": tokens * training_flops(hf, 48, sequence) / (48 * layer_s + head_s) / PEAK,
        "optimizer_ms": 1e3 * parameters * 30 / card.copy,  # reads 16 bytes a parameter, writes 14
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    rows = [step_prediction(QWEN3_30B_A3B, tokens, 4096, card) for card in CARDS.values() for tokens in (4096, 32_768)]
    if parser.parse_args().json:
        print(json.dumps({"cards": [asdict(card) for card in CARDS.values()], "rows": rows}, indent=1))
        return
    for row in rows:
        head = f"{row['card']}, {row['tokens']} tokens in sequences of 4096, {row['layers']} layers"
        print(
            f"{head}: {row['tokens_per_s']:,.0f} tokens/s, MFU {row['mfu']:.0%}, of the layers alone "
            f"{row['mfu_of_layers']:.0%}, ",
            end="",
        )
        print(
            f"of 48 layers {row['mfu_of_48_layers']:.0%}; output layer {row['head_ms']:.1f} ms, Adam "
            f"{row['optimizer_ms']:.1f} ms; a layer:"
        )
        for name, ms in [*row["layer_ms"].items(), ("sum", row["layer_total_ms"])]:
            print(f"  {name:34}{ms:8.2f} ms")


if __name__ == "__main__":
    main()
