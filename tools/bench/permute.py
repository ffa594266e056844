"""Rows to the experts and back, by index against megatron-core's own: python tools/bench/permute.py [--pairs N]

Random routes, one thread, forward and backward of permute and
unpermute. The two run in turn in one process; medians of the CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SIZES = [
    dict(experts=8, top_k=2, hidden=64),
    dict(experts=64, top_k=8, hidden=256),
    dict(experts=128, top_k=8, hidden=2048),
]
TOKENS = (128, 1500, 6000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs for each size")
    pairs = parser.parse_args().pairs
    import torch

    print("| experts | tokens | dtype | megatron-core ms | by index ms | ratio |\n|---|---|---|---|---|---|")
    for size in SIZES:
        for tokens in TOKENS[: 2 if size["hidden"] > 1000 else None]:
            for dtype in (torch.float32, torch.bfloat16):
                core, ours = (1e3 * statistics.median(times) for times in measure(tokens, dtype, pairs, **size))
                what = f"{size['experts']} top-{size['top_k']}, hidden {size['hidden']}"
                print(
                    f"| {what} | {tokens} | {str(dtype)[6:]} | {core:.2f} | {ours:.2f} | {core / ours:.2f} |",
                    flush=True,
                )


def measure(
    tokens: int, dtype: Any, pairs: int, experts: int, top_k: int, hidden: int
) -> tuple[list[float], list[float]]:
    """Seconds of each timed pair: (megatron-core's, by index)."""
    import torch

    from megarl.engine.device import setup_device

    # isort: split
    from megatron.core.transformer.moe import moe_utils

    from megarl.engine import permutation

    x = torch.randn(tokens, hidden, device=setup_device().device, dtype=dtype, requires_grad=True)
    chosen = torch.rand(tokens, experts).topk(top_k, 1).indices
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True)
    probs = (torch.rand(tokens, experts) * routing_map).requires_grad_()
    grad, grad_probs = torch.randn(tokens, hidden).to(dtype), torch.randn(tokens * top_k)
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs + 2):
        for module, seconds in list(zip((moe_utils, permutation), times, strict=True))[:: 1 if pair % 2 else -1]:
            start = time.process_time()
            rows, probs_N, index = module.permute(
                x, routing_map, probs=probs, num_out_tokens=tokens * top_k, fused=False, drop_and_pad=False
            )
            out = module.unpermute(
                rows, index, restore_shape=x.shape, routing_map=routing_map, fused=False, drop_and_pad=False
            )
            torch.autograd.backward([out, probs_N], [grad, grad_probs])
            if pair >= 2:
                seconds.append(time.process_time() - start)
            x.grad = probs.grad = None
    return times


if __name__ == "__main__":
    main()
