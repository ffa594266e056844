"""Packed causal attention of one layer of Qwen3-30B-A3B, forward and
backward: torch's varlen kernels against the padded rectangle, also with the rows of one of two context-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megarl.engine import attention as module
from megarl.engine.attention import PackedCausalAttention, packed_sequences, varlen_attention
from megarl.engine.batch import cp_spans
from tools.bench.gpu.common import DEVICE, ON_GPU, peak_bytes, relative, seconds

GATHER = "gather_from_sequence_parallel_region"


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
    heads, groups, dim, sizes = (4, 2, 16, (256,)) if smoke else (32, 4, 128, (4096, 32_768))
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    layer = PackedCausalAttention(SimpleNamespace(), 1)
    ways = {"rectangle": lambda: None, **({"varlen": varlen_attention} if ON_GPU and varlen_attention() else {})}
    shapes = ((heads, dim), (groups, dim), (groups, dim))
    yield {"heads": heads, "groups": groups, "head_dim": dim, "dtype": str(dtype)}
    for tokens in sizes:
        for kind, lengths in packs(tokens).items():
            yield from rows(layer, ways, shapes, dtype, kind, lengths, cp=1)
    yield from rows(layer, ways, shapes, dtype, "ragged", packs(sizes[0])["ragged"], cp=2)


def rows(
    layer: Any, ways: dict[str, Any], shapes: Any, dtype: torch.dtype, kind: str, lengths: list[int], cp: int
) -> Iterator[dict[str, Any]]:
    """cp: of so many ranks the first, whose rows the others' are given beside."""
    tokens, (heads, dim) = sum(lengths), shapes[0]
    own = tokens // cp
    q, k, v = (torch.randn(own, 1, *s, device=DEVICE.device, dtype=dtype).requires_grad_() for s in shapes)
    others = torch.randn(tokens - own, 1, shapes[1][0], 2 * dim, device=DEVICE.device, dtype=dtype)
    grad = torch.randn(own, 1, heads * dim, device=DEVICE.device, dtype=dtype)
    results = {}
    for way, choose in ways.items():
        packed = packed_sequences(lengths, cp_spans(tokens, cp), 0).to(DEVICE.device)
        with (
            mock.patch.object(module, "varlen_attention", choose),
            mock.patch.object(module.parallel_state, "get_context_parallel_group"),
            mock.patch.object(module, GATHER, lambda mine, **_: torch.cat([mine, others])),
        ):
            row = measure(layer, (q, k, v), grad, packed)
        results[way] = row.pop("results")
        flops = 4.0 * pairs(lengths, cp) * heads * dim
        rates = {"forward_flops_per_s": flops / row["forward_s"], "flops_per_s": 3.5 * flops / row["both_s"]}
        row = {"tokens": tokens, "pack": kind, "sequences": len(lengths), "cp": cp, "way": way, **row, **rates}
        if way == "varlen":
            row["difference"] = [relative(a, b) for a, b in zip(results["varlen"], results["rectangle"], strict=True)]
        yield {"row": row}


def pairs(lengths: list[int], cp: int) -> float:
    """Of query and key: half of each square; of the first rank's rows."""
    packed = packed_sequences(lengths, cp_spans(sum(lengths), cp), 0)
    assert packed.positions is not None
    return float(packed.positions.sum())
