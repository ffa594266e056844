"""Messages of a weight sync as bytes: slices of Hugging Face tensors in one buffer, each with its checksum.

In a message every slice starts at a multiple of ALIGNMENT bytes, so that the receiver's tensors are views of the
buffer; the checksums (XXH3, 64 bits, of the bytes as sent: cast and quantised) come last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megarl.weights.map.relations import HfSlice
from megarl.weights.reshard.hash import bytes_hash, tensor_hash
from megarl.weights.reshard.message import Manifest, Message

ALIGNMENT = 16  # bytes; a view of another dtype needs a multiple of its item size
HASH = np.dtype(np.uint64)
Dtypes = Mapping[str, torch.dtype]  # Hugging Face name -> dtype on the wire


class Corrupted(RuntimeError):
    """What arrived is not what was sent. The message names tensor, slice and sender."""


def message_bytes(slices: Sequence[HfSlice], dtypes: Dtypes) -> int:
    """Size of a message's buffer: payload, padding and checksums."""
    return _offsets(slices, dtypes)[-1] + HASH.itemsize * len(slices)


def payload_bytes(slices: Sequence[HfSlice], dtypes: Dtypes) -> int:
    return sum(each.rect.numel * dtypes[each.hf_name].itemsize for each in slices)


def pack(slices: Sequence[HfSlice], values: Sequence[Tensor], dtypes: Dtypes, buffer: Tensor) -> None:
    """Fills `buffer` (uint8 [message_bytes]) with `values`, one for each slice and of its size, cast to its dtype."""
    *offsets, end = _offsets(slices, dtypes)
    for each, value, offset in zip(slices, values, offsets, strict=True):
        _view(buffer, offset, each, dtypes).copy_(value)
    raw = buffer.cpu().numpy()
    sizes = [payload_bytes([each], dtypes) for each in slices]
    hashes = [bytes_hash(raw[offset : offset + size]) for offset, size in zip(offsets, sizes, strict=True)]
    buffer[end:].copy_(torch.from_numpy(np.array(hashes, HASH).view(np.uint8)))


class _Arrived(NamedTuple):
    source: int
    slice: HfSlice
    checksum: int  # as sent
    actual: int | None  # None until the slice is in its place


def assemble(bucket: Sequence[Message[HfSlice]], buffers: Sequence[Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """The shards of a bucket: views of a buffer where one slice fills them, else put together.

    Raises Corrupted where the bytes of a slice, in their final place, do not have the checksum they were sent with.
    """
    shards: dict[str, Tensor] = {}
    arrived: list[_Arrived] = []
    for message, buffer in zip(bucket, buffers, strict=True):
        *offsets, end = _offsets(message.slices, manifest.dtypes)
        raw = buffer.cpu().numpy()
        checksums = raw[end : end + HASH.itemsize * len(message.slices)].view(HASH).tolist()
        for each, offset, checksum in zip(message.slices, offsets, checksums, strict=True):
            view, rect, actual = _view(buffer, offset, each, manifest.dtypes), manifest.shards[each.hf_name].rect, None
            if each.rect.size == rect.size:
                shards[each.hf_name] = view
                actual = bytes_hash(raw[offset : offset + view.nbytes])
            else:
                if each.hf_name not in shards:
                    shards[each.hf_name] = torch.empty(rect.size, dtype=view.dtype, device=view.device)
                shards[each.hf_name][each.rect.within(rect).slices].copy_(view)
            arrived.append(_Arrived(message.source, each, checksum, actual))
    for source, each, checksum, actual in arrived:
        if actual is None:
            rect = manifest.shards[each.hf_name].rect
            actual = tensor_hash(shards[each.hf_name][each.rect.within(rect).slices])
        if actual != checksum:
            raise Corrupted(
                f"{each} from trainer rank {source} arrived with checksum {actual:016x}, was sent with {checksum:016x}"
            )
    return shards


def _view(buffer: Tensor, offset: int, each: HfSlice, dtypes: Dtypes) -> Tensor:
    nbytes = payload_bytes([each], dtypes)
    return buffer[offset : offset + nbytes].view(dtypes[each.hf_name]).view(each.rect.size)


def _offsets(slices: Sequence[HfSlice], dtypes: Dtypes) -> list[int]:
    """Where each slice starts, and behind them where the checksums start."""
    offsets = [0]
    for each in slices:
        offsets.append(offsets[-1] + -(-payload_bytes([each], dtypes) // ALIGNMENT) * ALIGNMENT)
    return offsets
