"""Full Hugging Face tensors at one rank, streamed in buckets: the
oracle path of the weight sync, and how a checkpoint is exported.

The plan is pure: every rank computes from the weight map which
rectangles each rank sends. One message a rank and bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.weights.map.layout import Layout
from megarl.weights.map.relations import Piece
from megarl.weights.map.weight_map import Param, WeightMap

BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Send:
    """A rectangle that `rank` contributes: piece.hf is the tensor, (chunk, name) the parameter it is cut from."""

    rank: int
    chunk: int
    name: str
    piece: Piece


def plan_gather(weight_map: WeightMap, layout: Layout) -> dict[str, list[Send]]:
    """Hugging Face name -> the rectangles it is put together from, each
    from exactly one rank. Checks that they cover the tensor.
    """
    plan: dict[str, list[Send]] = {name: [] for name in weight_map.hf_shapes}
    for rank in range(layout.world):
        for param in weight_map.params(layout, layout.coord(rank)):
            if param.replica == 0:
                for piece in param.pieces:
                    plan[piece.hf].append(Send(rank, param.chunk, param.name, piece))
    for name, sends in plan.items():
        covered = sum(torch.Size(send.piece.shape).numel() for send in sends)
        if covered != torch.Size(weight_map.hf_shapes[name]).numel():
            raise RuntimeError(
                f"layout {layout} covers {covered} of {torch.Size(weight_map.hf_shapes[name]).numel()} elements of "
                f"{name}"
            )
    return plan


def gather_full(
    plan: dict[str, list[Send]],
    weight_map: WeightMap,
    params: Iterable[tuple[Param, Tensor]],
    rank: int,
    dtype: torch.dtype,
    root: int = 0,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, full tensor) at `root`; nothing elsewhere. Every rank must exhaust it.

    Tensors come in `dtype`, except those that stay float32 (WeightMap.hf_float32): these come first.
    """
    held = {(param.chunk, param.name): tensor.detach() for param, tensor in params}
    for wanted, names in (
        (torch.float32, weight_map.hf_float32),
        (dtype, weight_map.hf_shapes.keys() - weight_map.hf_float32),
    ):
        shapes = {name: shape for name, shape in weight_map.hf_shapes.items() if name in names}
        yield from _gather(plan, shapes, held, rank, wanted, root, bucket_bytes)


def _gather(
    plan: dict[str, list[Send]],
    shapes: dict[str, tuple[int, ...]],
    held: dict[tuple[int, str], Tensor],
    rank: int,
    dtype: torch.dtype,
    root: int,
    bucket_bytes: int,
) -> Iterator[tuple[str, Tensor]]:
    device = next(iter(held.values())).device
    for names in _buckets(shapes, dtype.itemsize, bucket_bytes):
        sends = [send for name in names for send in plan[name]]
        mine = [_cut(held, send).to(dtype).flatten() for send in sends if send.rank == rank]
        if rank != root:
            if mine:
                dist.send(torch.cat(mine), dst=root)
            continue
        incoming = {rank: torch.cat(mine)} if mine else {}
        for source in sorted({send.rank for send in sends} - {root}):
            count = sum(torch.Size(send.piece.shape).numel() for send in sends if send.rank == source)
            incoming[source] = torch.empty(count, dtype=dtype, device=device)
            dist.recv(incoming[source], src=source)
        yield from _assemble(names, plan, shapes, incoming, dtype)


def _assemble(
    names: list[str],
    plan: dict[str, list[Send]],
    shapes: dict[str, tuple[int, ...]],
    incoming: dict[int, Tensor],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    at = dict.fromkeys(incoming, 0)
    for name in names:
        full = torch.empty(shapes[name], dtype=dtype, device=next(iter(incoming.values())).device)
        for send in plan[name]:
            count = torch.Size(send.piece.shape).numel()
            block = incoming[send.rank][at[send.rank] : at[send.rank] + count].view(send.piece.shape)
            at[send.rank] += count
            full[tuple(slice(a, a + n) for a, n in zip(send.piece.hf_start, send.piece.shape))] = block
        yield name, full


def _cut(held: dict[tuple[int, str], Tensor], send: Send) -> Tensor:
    return held[send.chunk, send.name][tuple(slice(a, a + n) for a, n in zip(send.piece.start, send.piece.shape))]


def _buckets(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        bytes_ = torch.Size(shape).numel() * itemsize
        if names and size + bytes_ > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_
    if names:
        yield names
