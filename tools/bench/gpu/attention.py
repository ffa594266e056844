"""Packed causal attention of one layer of Qwen3-30B-A3B, forward and
backward: torch's varlen kernels against the padded rectangle.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from tools.bench.gpu.common import DEVICE, ON_GPU, peak_bytes, relative, seconds


def packs(tokens: int) -> dict[str, list[int]]:
    """Lengths of the sequences in a pack: equal ones, one alone, and ragged ones as rollouts give them."""
    generator = torch.Generator().manual_seed(0)
    ragged: list[int] = []
    while (left := tokens - sum(ragged)) > 0:
        ragged.append(min(left, int(torch.randint(tokens // 64, tokens // 8, (1,), generator=generator))))
    return {"equal": [tokens // 8] * 8, "one": [tokens], "ragged": ragged}


def measure(layer: Any, qkv: tuple[torch.Tensor, ...], grad: torch.Tensor, packed: Any) -> dict[str, Any]:
    def forward() -> torch.Tensor:
        return layer(*qkv, None, packed_seq_params=packed)

    def both() -> torch.Tensor:
        for x in qkv:
            x.grad = None
        out = forward()
        out.backward(grad)
        return out

    times = {"forward_s": seconds(forward), "both_s": seconds(both), "peak_bytes": peak_bytes(both)}
    return {**times, "results": [both(), *(x.grad for x in qkv)]}


def run(smoke: bool) -> Iterator[dict[str, Any]]:
    from megarl.engine import attention as module
    from megarl.engine.attention import PackedCausalAttention, packed_sequences, varlen_attention

    heads, groups, dim, sizes = (4, 2, 16, (256,)) if smoke else (32, 4, 128, (4096, 32_768))
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    layer = PackedCausalAttention(SimpleNamespace(), 1)
    ways = {"rectangle": lambda: None, **({"varlen": varlen_attention} if ON_GPU and varlen_attention() else {})}
    yield {"heads": heads, "groups": groups, "head_dim": dim, "dtype": str(dtype)}
    for tokens in sizes:
        for kind, lengths in packs(tokens).items():
            shapes = ((heads, dim), (groups, dim), (groups, dim))
            q, k, v = (torch.randn(tokens, 1, *s, device=DEVICE.device, dtype=dtype).requires_grad_() for s in shapes)
            grad = torch.randn(tokens, 1, heads * dim, device=DEVICE.device, dtype=dtype)
            packed = packed_sequences(lengths, [[range(tokens)]], 0).to(DEVICE.device)
            results = {}
            for way, choose in ways.items():
                standard, module.varlen_attention = module.varlen_attention, choose
                try:
                    row = measure(layer, (q, k, v), grad, packed)
                finally:
                    module.varlen_attention = standard
                results[way] = row.pop("results")
                flops = sum(2.0 * n * n * heads * dim for n in lengths)  # causal: half of 4 n^2
                rates = {
                    "forward_flops_per_s": flops / row["forward_s"],
                    "flops_per_s": 3.5 * flops / row["both_s"],
                }
                row = {"tokens": tokens, "pack": kind, "sequences": len(lengths), "way": way, **row, **rates}
                if way == "varlen":
                    row["difference"] = [
                        relative(a, b) for a, b in zip(results["varlen"], results["rectangle"], strict=True)
                    ]
                yield {"row": row}
