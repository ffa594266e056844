"""Full Hugging Face tensors at rank 0, streamed in buckets: the
oracle path of the weight sync, and how a checkpoint is exported.

The plan is pure: every rank computes from the weight map which
rectangles each rank sends. One message a rank and bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.weights.buckets import fill_buckets
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import Param, WeightMap
from megarl.weights.reshard.message import Transfer, named_tensors

if TYPE_CHECKING:
    from megarl.weights.reshard.message import Tensors

BUCKET_BYTES = 256 * 2**20


class Send(NamedTuple):
    """What `rank` contributes to a full tensor."""

    rank: int
    transfer: Transfer


GatherPlan = dict[str, list[Send]]  # Hugging Face name -> what it is put together from, each from exactly one rank


def plan_gather(weight_map: WeightMap, layout: Layout) -> GatherPlan:
    """Raises RuntimeError where the sends do not cover a tensor."""
    plan: GatherPlan = {name: [] for name in weight_map.hf_shapes}
    for rank in range(layout.world):
        for param in weight_map.params(layout, layout.coord(rank)):
            if param.replica == 0:
                for piece in param.pieces:
                    transfer = Transfer(piece.hf_name, piece.rect, piece.offset, param.chunk, param.name)
                    plan[piece.hf_name].append(Send(rank, transfer))
    for name, sends in plan.items():
        covered, whole = sum(send.transfer.rect.numel for send in sends), math.prod(weight_map.hf_shapes[name])
        if covered != whole:
            raise RuntimeError(f"layout {layout} covers {covered} of {whole} elements of {name}")
    return plan


def gather_full(
    plan: GatherPlan,
    weight_map: WeightMap,
    params: Iterable[tuple[Param, Tensor]],
    rank: int,
    dtype: torch.dtype,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, full tensor) at rank 0; nothing elsewhere. Every rank must exhaust it.

    Tensors come in `dtype`, except those that stay float32 (WeightMap.hf_float32): these come first.
    """
    tensors = named_tensors(params)
    device = next(iter(tensors.values())).device
    for wire_dtype, of_dtype in (
        (torch.float32, weight_map.hf_float32),
        (dtype, weight_map.hf_shapes.keys() - weight_map.hf_float32),
    ):
        shapes = {name: shape for name, shape in weight_map.hf_shapes.items() if name in of_dtype}
        sized = ((name, math.prod(shape) * wire_dtype.itemsize) for name, shape in shapes.items())
        for names in fill_buckets(sized, bucket_bytes):
            incoming = _exchange([send for name in names for send in plan[name]], tensors, rank, wire_dtype)
            if rank == 0:
                for name in names:
                    full = torch.empty(shapes[name], dtype=wire_dtype, device=device)
                    for send in plan[name]:
                        block = next(incoming[send.rank])
                        full[send.transfer.rect.slices] = block.view(send.transfer.rect.size)
                    yield name, full


def _exchange(sends: list[Send], tensors: Tensors, rank: int, dtype: torch.dtype) -> dict[int, Iterator[Tensor]]:
    """One bucket. At rank 0, for each rank that sends: its blocks, flat, in the order of `sends`."""
    ours = [send.transfer.cut(tensors).to(dtype).flatten() for send in sends if send.rank == rank]
    if rank != 0:
        if ours:
            dist.send(torch.cat(ours), dst=0)
        return {}
    incoming = {0: iter(ours)}
    for source in sorted({send.rank for send in sends} - {0}):
        sizes = [send.transfer.rect.numel for send in sends if send.rank == source]
        buffer = torch.empty(sum(sizes), dtype=dtype, device=next(iter(tensors.values())).device)
        dist.recv(buffer, src=source)
        incoming[source] = iter(buffer.split(sizes))
    return incoming
