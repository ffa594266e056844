"""What a weight sync says on the wire: rectangles of Hugging Face
tensors, fused into messages, each rectangle with its checksum.

A manifest is told once, when the two ends meet; after that nothing travels but payload and checksums. In a message
every rectangle starts at a multiple of ALIGNMENT bytes, so that the receiver's tensors are views of the buffer; the
checksums (XXH3, 64 bits, of the bytes as sent: cast and quantised) come last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarl.weights.reshard.hash import bytes_hash, tensor_hash

ALIGNMENT = 16  # bytes; a view of another dtype needs a multiple of its item size
HASH = np.dtype(np.uint64)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Held:
    """What one rank holds of a tensor: hf[start : start + size] on
    every axis, of a tensor of shape `full`; dtype is its name in torch.
    """

    full: Shape
    start: Shape
    size: Shape
    dtype: str


@dataclass(frozen=True)
class Part:
    """The rectangle hf[start : start + shape] of the Hugging Face tensor `name`."""

    name: str
    start: Shape
    shape: Shape

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(f'{a}:{a + n}' for a, n in zip(self.start, self.shape))}]"


@dataclass(frozen=True)
class Message:
    """What one source sends to one destination in one bucket."""

    source: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Manifest:
    """What one destination receives in every sync. All parts of a
    tensor lie in one bucket; tensors are in the order of the buckets.
    """

    tensors: dict[str, Held]
    buckets: tuple[tuple[Message, ...], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "tensors": {name: [held.full, held.start, held.size, held.dtype] for name, held in self.tensors.items()},
            "buckets": [
                [[m.source, [[p.name, p.start, p.shape] for p in m.parts]] for m in bucket] for bucket in self.buckets
            ],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Manifest:
        tensors = {
            name: Held(tuple(full), tuple(a), tuple(n), dtype) for name, (full, a, n, dtype) in data["tensors"].items()
        }
        buckets = tuple(
            tuple(
                Message(source, tuple(Part(name, tuple(a), tuple(n)) for name, a, n in parts))
                for source, parts in bucket
            )
            for bucket in data["buckets"]
        )
        return Manifest(tensors, buckets)


class Corrupted(RuntimeError):
    """What arrived is not what was sent. The message names tensor, slice and sender."""


def whole_tensors(shapes: Mapping[str, Shape], dtypes: Mapping[str, str], bucket_bytes: int) -> Manifest:
    """The manifest of a broadcast: every tensor whole, from rank 0, in
    buckets of at most `bucket_bytes`, or of one larger tensor.
    """
    tensors = {name: Held(shape, (0,) * len(shape), shape, dtypes[name]) for name, shape in shapes.items()}
    buckets = []
    for names in fill_buckets({name: held_bytes(held) for name, held in tensors.items()}, bucket_bytes):
        buckets.append((Message(0, tuple(Part(name, tensors[name].start, tensors[name].size) for name in names)),))
    return Manifest(tensors, tuple(buckets))


def fill_buckets(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in order, cut where the sum of their sizes would pass `limit`."""
    names: list[str] = []
    size = 0
    for name, nbytes in sizes.items():
        if names and size + nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    if names:
        yield names


def held_bytes(held: Held) -> int:
    return _count(held.size) * getattr(torch, held.dtype).itemsize


def message_bytes(parts: Sequence[Part], tensors: Mapping[str, Held]) -> int:
    """Size of a message's buffer: payload, padding and checksums."""
    return _offsets(parts, tensors)[-1] + HASH.itemsize * len(parts)


def payload_bytes(parts: Sequence[Part], tensors: Mapping[str, Held]) -> int:
    return sum(_part_bytes(part, tensors) for part in parts)


def pack(parts: Sequence[Part], values: Sequence[Tensor], tensors: Mapping[str, Held], buffer: Tensor) -> None:
    """Fills `buffer` (uint8 [message_bytes]) with `values`, one for
    each part and of its shape, cast to the dtype of its tensor.
    """
    offsets = _offsets(parts, tensors)
    for part, value, offset in zip(parts, values, offsets):
        _view(buffer, offset, part, tensors).copy_(value)
    raw = buffer.cpu().numpy()
    hashes = [bytes_hash(raw[a : a + _part_bytes(part, tensors)]) for part, a in zip(parts, offsets)]
    buffer[offsets[-1] :].copy_(torch.from_numpy(np.array(hashes, HASH).view(np.uint8)))


def assemble(bucket: Sequence[Message], buffers: Sequence[Tensor], tensors: Mapping[str, Held]) -> dict[str, Tensor]:
    """The tensors of a bucket, each as its destination holds it: a view
    of a buffer where one part fills it, else put together.

    Raises Corrupted where the bytes of a part, in their final place, do not have the checksum they were sent with.
    """
    result: dict[str, Tensor] = {}
    sent: list[
        tuple[Message, Part, int, int | None]
    ] = []  # message, part, checksum as sent, and as found where it is known already
    for message, buffer in zip(bucket, buffers):
        offsets = _offsets(message.parts, tensors)
        raw = buffer.cpu().numpy()
        hashes = raw[offsets[-1] : offsets[-1] + HASH.itemsize * len(message.parts)].view(HASH)
        for part, offset, checksum in zip(message.parts, offsets, hashes.tolist()):
            held, view = tensors[part.name], _view(buffer, offset, part, tensors)
            if part.shape == held.size:
                result[part.name] = view
                sent.append((message, part, checksum, bytes_hash(raw[offset : offset + _part_bytes(part, tensors)])))
                continue
            if part.name not in result:
                result[part.name] = torch.empty(held.size, dtype=view.dtype, device=view.device)
            _place(result[part.name], part, held).copy_(view)
            sent.append((message, part, checksum, None))
    for message, part, checksum, found in sent:
        if found is None:
            found = tensor_hash(_place(result[part.name], part, tensors[part.name]))
        if found != checksum:
            raise Corrupted(
                f"{part} from trainer rank {message.source} arrived with checksum {found:016x}, was sent with "
                f"{checksum:016x}"
            )
    return result


def _place(tensor: Tensor, part: Part, held: Held) -> Tensor:
    return tensor[tuple(slice(a - b, a - b + n) for a, b, n in zip(part.start, held.start, part.shape))]


def _view(buffer: Tensor, offset: int, part: Part, tensors: Mapping[str, Held]) -> Tensor:
    dtype = getattr(torch, tensors[part.name].dtype)
    return buffer[offset : offset + _count(part.shape) * dtype.itemsize].view(dtype).view(part.shape)


def _offsets(parts: Sequence[Part], tensors: Mapping[str, Held]) -> list[int]:
    """Where each part starts, and behind them where the checksums start."""
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + -(-_part_bytes(part, tensors) // ALIGNMENT) * ALIGNMENT)
    return offsets


def _part_bytes(part: Part, tensors: Mapping[str, Held]) -> int:
    return _count(part.shape) * getattr(torch, tensors[part.name].dtype).itemsize


def _count(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))
