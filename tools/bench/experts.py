"""Forward and backward of one layer's experts, grouped against sequential: python tools/bench/experts.py [--pairs N]

Random routes, float32, one thread, gradients into Megatron-style main_grad buffers. The two run in turn in one process;
medians of the CPU time, which a neighbour on the same cores does not change much.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SIZES = [dict(experts=8, top_k=2, hidden=64, ffn=64), dict(experts=64, top_k=8, hidden=256, ffn=128)]
TOKENS = (128, 1500, 6000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs for each size")
    pairs = parser.parse_args().pairs
    print("| experts | tokens | sequential ms | grouped ms | sequential / grouped |\n|---|---|---|---|---|")
    for size in SIZES:
        layers = make_layers(**{k: v for k, v in size.items() if k != "top_k"})
        for tokens in TOKENS:
            times = measure(layers, size["experts"], size["top_k"], size["hidden"], tokens, pairs)
            sequential, grouped = (1e3 * statistics.median(times[name]) for name in ("sequential", "grouped"))
            what = f"{size['experts']} top-{size['top_k']}, hidden {size['hidden']}, width {size['ffn']}"
            print(f"| {what} | {tokens} | {sequential:.2f} | {grouped:.2f} | {sequential / grouped:.2f} |", flush=True)


def make_layers(experts: int, hidden: int, ffn: int) -> dict[str, Any]:
    """Two real expert modules of equal weights, as megatron-core builds them in a world of one rank."""
    import torch

    from tools.one_rank import expert_layer, one_rank

    # isort: split
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megarl.engine.experts import GroupedExperts

    one_rank()
    kinds = {"sequential": SequentialMLP, "grouped": GroupedExperts}
    layers = {name: expert_layer(kind, experts, hidden, ffn) for name, kind in kinds.items()}
    layers["grouped"].load_state_dict(layers["sequential"].state_dict())
    for layer in layers.values():
        for param in layer.parameters():
            param.main_grad = torch.zeros_like(param)
            param.grad_added_to_main_grad = False
    return layers


def step(layer: Any, x: Any, counts: Any, probs: Any, grad: Any) -> None:
    """Forward, backward, and what Megatron's DDP does with a gradient that autograd hands it."""
    layer(x, counts, probs)[0].backward(grad)
    for param in layer.parameters():
        if param.grad is not None:
            param.main_grad.add_(param.grad)
            param.grad = None
    x.grad = probs.grad = None


def measure(
    layers: dict[str, Any], experts: int, top_k: int, hidden: int, tokens: int, pairs: int
) -> dict[str, list[float]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    counts = chosen.flatten().bincount(minlength=experts)
    x = torch.randn(tokens * top_k, hidden, generator=generator, requires_grad=True)
    probs = torch.rand(tokens * top_k, generator=generator, requires_grad=True)
    grad = torch.randn(tokens * top_k, hidden, generator=generator)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for pair in range(pairs + 2):
        for name in list(layers)[:: 1 if pair % 2 else -1]:
            start = time.process_time()
            step(layers[name], x, counts, probs, grad)
            if pair >= 2:
                times[name].append(time.process_time() - start)
    return times


if __name__ == "__main__":
    main()
