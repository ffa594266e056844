"""Named tensors to flat byte buffers and back: the format of a weight sync on the wire.

A bucket is one uint8 buffer plus, per tensor, its name, dtype, shape and checksum. Every tensor starts at a multiple of ALIGNMENT bytes,
so that the receiver's tensors are views of the buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from megarl.weights.hash import tensor_hash

ALIGNMENT = 16  # bytes; a view of another dtype needs a multiple of its item size


@dataclass
class Bucket:
    """Some tensors as one buffer. `buffer` is uint8 [nbytes], on the tensors' device; the lists run in parallel."""

    buffer: torch.Tensor
    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)

    def header(self) -> dict[str, Any]:
        """What travels beside the buffer, as plain JSON types."""
        return {"names": self.names, "dtypes": self.dtypes, "shapes": self.shapes, "hashes": self.hashes}


def buckets(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Streams named tensors as buckets of at most `bucket_bytes`; a larger tensor makes a bucket of its own.

    Every tensor is copied once. Buffers are not reused: a bucket stays valid for as long as it is referenced.
    """
    held: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        nbytes = _padded(tensor.numel() * tensor.element_size())
        if held and size + nbytes > bucket_bytes:
            yield _pack(held, size)
            held, size = [], 0
        held.append((name, tensor.detach()))
        size += nbytes
    if held:
        yield _pack(held, size)


def _pack(tensors: list[tuple[str, torch.Tensor]], size: int) -> Bucket:
    bucket = Bucket(torch.empty(size, dtype=torch.uint8, device=tensors[0][1].device))
    offset = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        bucket.buffer[offset : offset + nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        bucket.names.append(name)
        bucket.dtypes.append(str(tensor.dtype).removeprefix("torch."))
        bucket.shapes.append(list(tensor.shape))
        bucket.hashes.append(tensor_hash(tensor))  # of the source, not of the copy: a fault in packing shows too
        offset += _padded(nbytes)
    return bucket


def buffer_bytes(dtypes: list[str], shapes: list[list[int]]) -> int:
    """Size of the buffer that holds these tensors, padding included."""
    return sum(_padded(_nbytes(dtype, shape)) for dtype, shape in zip(dtypes, shapes))


def unpack(buffer: torch.Tensor, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a bucket's buffer (uint8 [buffer_bytes]), as views of it."""
    offset = 0
    for name, dtype, shape in zip(names, dtypes, shapes):
        nbytes = _nbytes(dtype, shape)
        yield name, buffer[offset : offset + nbytes].view(getattr(torch, dtype)).view(shape)
        offset += _padded(nbytes)


def _nbytes(dtype: str, shape: list[int]) -> int:
    return int(torch.Size(shape).numel()) * getattr(torch, dtype).itemsize


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
