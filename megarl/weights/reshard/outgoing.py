"""What each trainer rank sends in a weight sync: slices, or whole tensors from rank 0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
from torch import Tensor

from megarl.weights.buckets import IN_FLIGHT
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import Param, WeightMap
from megarl.weights.reshard.gather import BUCKET_BYTES, gather_full, plan_gather
from megarl.weights.reshard.manifest import slice_inputs, slice_plan, whole_inputs, whole_manifest, wire_dtypes
from megarl.weights.reshard.message import Manifest, named_tensors
from megarl.weights.reshard.pack import message_bytes, pack, payload_bytes
from megarl.weights.reshard.rollout_layout import RolloutLayout
from megarl.weights.transport.send import Outgoing


class WholeTensors:
    """sync.transport broadcast: rank 0 gathers full tensors and broadcasts them. The oracle of the other."""

    senders = 1

    def __init__(self, weight_map: WeightMap, layout: Layout, dtype: torch.dtype, rank: int) -> None:
        self._map, self._dtype, self._rank = weight_map, dtype, rank
        self._plan = plan_gather(weight_map, layout)
        float32_first = sorted(weight_map.hf_shapes, key=lambda name: name not in weight_map.hf_float32)
        shapes = {name: weight_map.hf_shapes[name] for name in float32_first}  # gather_full's order
        dtypes = wire_dtypes(weight_map, dtype)
        self._manifest = whole_manifest(shapes, dtypes, BUCKET_BYTES)
        self.manifest_inputs = whole_inputs(shapes, dtypes, BUCKET_BYTES)

    @property
    def bytes(self) -> int:
        """What every rollout rank receives."""
        return sum(shard.nbytes for shard in self._manifest.shards.values())

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
        self.senders = layout.world
        self.manifest_inputs = slice_inputs(weight_map, layout, rollout, dtype)
        self.plan = slice_plan(weight_map, layout, rollout, dtype)
        self._dtypes = wire_dtypes(weight_map, dtype)
        self._buckets = [list(messages) for _, messages in groupby(self.plan.sends(rank), key=lambda m: m.bucket)]
        self._ring: dict[tuple[int, int], Tensor] = {}  # (destination, turn) -> buffer; Plan.kept_bytes counts it

    @property
    def bytes(self) -> int:
        """What all rollout ranks receive together."""
        return int(self.plan.load.received.sum())

    @property
    def sent(self) -> int:
        """What this rank sends, without padding and checksums."""
        return sum(payload_bytes(message.slices, self._dtypes) for bucket in self._buckets for message in bucket)

    def buckets(self, params: Iterable[tuple[Param, Tensor]]) -> Iterator[Outgoing]:
        tensors = named_tensors(params)
        for turn, messages in enumerate(self._buckets):
            outgoing: list[tuple[Tensor, int | None]] = []
            for message in messages:
                assert message.destination is not None
                values = [transfer.cut(tensors) for transfer in message.slices]
                nbytes = message_bytes(message.slices, self._dtypes)
                buffer = self._buffer(message.destination, turn % IN_FLIGHT, nbytes, values[0].device)
                pack(message.slices, values, self._dtypes, buffer)
                outgoing.append((buffer, self.senders + message.destination))
            yield Outgoing(outgoing, messages[0].bucket)

    def _buffer(self, destination: int, turn: int, nbytes: int, device: torch.device) -> Tensor:
        key = destination, turn
        if key not in self._ring or self._ring[key].numel() < nbytes:
            self._ring[key] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return self._ring[key][:nbytes]


def whole_buckets(tensors: Iterable[tuple[str, Tensor]], manifest: Manifest) -> Iterator[Outgoing]:
    """The buckets of a broadcast (whole_manifest): `tensors` in its order, each read when its turn comes."""
    stream = iter(tensors)
    for number, (message,) in enumerate(manifest.buckets):
        named = [next(stream) for _ in message.slices]
        if [name for name, _ in named] != [each.hf_name for each in message.slices]:
            raise ValueError(
                f"the broadcast of {message.slices[0].hf_name} and what follows came in another order than its "
                "manifest says"
            )
        nbytes = message_bytes(message.slices, manifest.dtypes)
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=named[0][1].device)
        pack(message.slices, [tensor for _, tensor in named], manifest.dtypes, buffer)
        yield Outgoing([(buffer, None)], number)
