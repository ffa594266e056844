"""What each trainer rank sends in a weight sync, and what each rollout
rank is told to expect: slices, or whole tensors from rank 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
from torch import Tensor

from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import Param, WeightMap
from megarl.weights.reshard.gather import BUCKET_BYTES, gather_full, plan_gather
from megarl.weights.reshard.pack import (
    Held,
    Manifest,
    Message,
    Part,
    Shape,
    held_bytes,
    message_bytes,
    pack,
    payload_bytes,
    whole_tensors,
)
from megarl.weights.reshard.plan import make_plan
from megarl.weights.reshard.rollout_layout import RolloutLayout
from megarl.weights.transport.send import IN_FLIGHT, Outgoing

SLICE_BUCKET_BYTES = 16 * 2**20  # into one rollout rank: small enough that packing, the wire and checking overlap


class WholeTensors:
    """sync.transport broadcast: rank 0 gathers full tensors and broadcasts them. The oracle of the other."""

    senders = 1

    def __init__(self, weight_map: WeightMap, layout: Layout, engines: int, dtype: torch.dtype, rank: int) -> None:
        self._map, self._engines, self._dtype, self._rank = weight_map, engines, dtype, rank
        self._plan = plan_gather(weight_map, layout)
        float32_first = sorted(
            weight_map.hf_shapes, key=lambda name: name not in weight_map.hf_float32
        )  # gather_full's order
        shapes = {name: weight_map.hf_shapes[name] for name in float32_first}
        self._manifest = whole_tensors(shapes, wire_dtypes(weight_map, dtype), BUCKET_BYTES)

    @property
    def bytes(self) -> int:
        """What every rollout rank receives."""
        return sum(map(held_bytes, self._manifest.tensors.values()))

    def manifests(self) -> list[list[Manifest]]:
        return [[self._manifest]] * self._engines

    def buckets(self, params: Iterable[tuple[Param, Tensor]]) -> Iterator[Outgoing]:
        """Collective: every trainer rank must exhaust it."""
        tensors = gather_full(self._plan, self._map, params, self._rank, self._dtype)
        if self._rank == 0:
            yield from whole_buckets(tensors, self._manifest)
        else:
            yield from (Outgoing([]) for _ in tensors)


class Slices:
    """sync.transport reshard: every trainer rank sends each rollout rank the slices that the plan has it send
    (megarl/weights/reshard/plan.py).
    """

    def __init__(
        self, weight_map: WeightMap, layout: Layout, rollout: RolloutLayout, dtype: torch.dtype, rank: int
    ) -> None:
        self._map, self._rollout, self.senders = weight_map, rollout, layout.world
        self._dtypes = wire_dtypes(weight_map, dtype)
        self.plan = make_plan(layout, rollout, weight_map, itemsize=dtype.itemsize, bucket_bytes=SLICE_BUCKET_BYTES)
        whole = {
            name: Held(shape, (0,) * len(shape), shape, self._dtypes[name])
            for name, shape in weight_map.hf_shapes.items()
        }
        self._tensors = whole  # packing asks for the dtype alone
        self._messages = [
            list(messages) for _, messages in groupby(self.plan.sends(rank), key=lambda message: message.bucket)
        ]
        self._parts = [
            [tuple(Part(t.hf, t.hf_start, t.shape) for t in m.transfers) for m in messages]
            for messages in self._messages
        ]
        self._ring: dict[tuple[int, int], Tensor] = {}  # (destination, turn) -> buffer

    @property
    def bytes(self) -> int:
        """What all rollout ranks receive together."""
        return int(self.plan.load.received.sum())

    @property
    def sent(self) -> int:
        """What this rank sends, without padding and checksums."""
        return sum(payload_bytes(parts, self._tensors) for bucket in self._parts for parts in bucket)

    def manifests(self) -> list[list[Manifest]]:
        each = self._rollout.ranks
        return [
            [self._manifest(engine * each + rank) for rank in range(each)] for engine in range(self._rollout.engines)
        ]

    def _manifest(self, rank: int) -> Manifest:
        rects = {name: rect for bucket in self.plan.slices(rank) for name, rect in bucket.items()}
        shapes = self._map.hf_shapes
        tensors = {
            name: Held(shapes[name], rects[name].start, rects[name].shape, self._dtypes[name])
            for name in shapes
            if name in rects
        }
        buckets: list[list[Message]] = [[] for _ in range(self.plan.buckets)]
        for message in self.plan.receives(rank):
            parts = tuple(Part(t.hf, t.hf_start, t.shape) for t in message.transfers)
            buckets[message.bucket].append(Message(message.source, parts))
        return Manifest(tensors, tuple(map(tuple, buckets)))

    def buckets(self, params: Iterable[tuple[Param, Tensor]]) -> Iterator[Outgoing]:
        held = {(param.chunk, param.name): tensor.detach() for param, tensor in params}
        for turn, (messages, all_parts) in enumerate(zip(self._messages, self._parts)):
            outgoing: list[tuple[Tensor, int | None]] = []
            for message, parts in zip(messages, all_parts):
                values = [_cut(held[t.chunk, t.param], t.start, t.shape) for t in message.transfers]
                buffer = self._buffer(
                    message.destination, turn % IN_FLIGHT, message_bytes(parts, self._tensors), values[0].device
                )
                pack(parts, values, self._tensors, buffer)
                outgoing.append((buffer, self.senders + message.destination))
            yield Outgoing(outgoing, messages[0].bucket)

    def _buffer(self, destination: int, turn: int, nbytes: int, device: torch.device) -> Tensor:
        key = destination, turn
        if key not in self._ring or self._ring[key].numel() < nbytes:
            self._ring[key] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return self._ring[key][:nbytes]


def wire_dtypes(weight_map: WeightMap, dtype: torch.dtype) -> dict[str, str]:
    """The dtype in which each Hugging Face tensor is sent, by its name in torch."""
    return {
        name: "float32" if name in weight_map.hf_float32 else str(dtype).removeprefix("torch.")
        for name in weight_map.hf_shapes
    }


def whole_buckets(tensors: Iterable[tuple[str, Tensor]], manifest: Manifest) -> Iterator[Outgoing]:
    """The buckets of a broadcast (whole_tensors): `tensors` in the manifest's order, each read when its turn comes."""
    stream = iter(tensors)
    for number, (message,) in enumerate(manifest.buckets):
        named = [next(stream) for _ in message.parts]
        if [name for name, _ in named] != [part.name for part in message.parts]:
            raise ValueError(
                f"the broadcast of {message.parts[0].name} and what follows came in another order than its manifest "
                "says"
            )
        buffer = torch.empty(
            message_bytes(message.parts, manifest.tensors), dtype=torch.uint8, device=named[0][1].device
        )
        pack(message.parts, [tensor for _, tensor in named], manifest.tensors, buffer)
        yield Outgoing([(buffer, None)], number)


def _cut(tensor: Tensor, start: Shape, shape: Shape) -> Tensor:
    return tensor[tuple(slice(a, a + n) for a, n in zip(start, shape))]
