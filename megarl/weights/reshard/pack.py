"""Messages of a weight sync as bytes: slices of Hugging Face tensors in one buffer, each with its checksum.

In a message every slice starts at a multiple of ALIGNMENT bytes, so that the receiver's tensors are views of the
buffer; the checksums (64 bits, hash.py, of the bytes as sent: cast and quantised) come last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megarl.weights.map.relations import HfSlice
from megarl.weights.reshard.hash import checksums
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
    views = [_view(buffer, offset, each, dtypes) for each, offset in zip(slices, offsets, strict=True)]
    alike: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for view, value in zip(views, values, strict=True):
        into, of = alike.setdefault((view.dtype, value.dtype), ([], []))
        into.append(view)
        of.append(value)
    for into, of in alike.values():  # some releases of torch take the first tensor's dtype for all (pytorch#173383)
        torch._foreach_copy_(into, of)  # a kernel for each of thousands of experts costs more than its bytes
    buffer[end:].copy_(checksums(views).view(torch.uint8))


def assemble(bucket: Sequence[Message[HfSlice]], buffers: Sequence[Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """The shards of a bucket: views of a buffer where one slice fills them, else put together.

    Raises Corrupted where the bytes of a slice, in their final place, do not have the checksum they were sent with.
    """
    shards: dict[str, Tensor] = {}
    arrived: list[tuple[int, HfSlice]] = []  # with the rank that sent it
    sent: list[Tensor] = []
    for message, buffer in zip(bucket, buffers, strict=True):
        *offsets, end = _offsets(message.slices, manifest.dtypes)
        sent.append(buffer[end : end + HASH.itemsize * len(message.slices)].view(torch.int64))
        for each, offset in zip(message.slices, offsets, strict=True):
            view, rect = _view(buffer, offset, each, manifest.dtypes), manifest.shards[each.hf_name].rect
            if each.rect.size == rect.size:
                shards[each.hf_name] = view
            else:
                if each.hf_name not in shards:
                    shards[each.hf_name] = torch.empty(rect.size, dtype=view.dtype, device=view.device)
                shards[each.hf_name][each.rect.within(rect).slices].copy_(view)
            arrived.append((message.source, each))
    placed = [shards[each.hf_name][each.rect.within(manifest.shards[each.hf_name].rect).slices] for _, each in arrived]
    if placed:
        _compare(arrived, checksums(placed), torch.cat(sent))
    return shards


def _compare(arrived: list[tuple[int, HfSlice]], actual: Tensor, sent: Tensor) -> None:
    """One look at the device for a whole bucket."""
    for number in (actual != sent).nonzero().flatten().tolist():
        source, each = arrived[number]
        found, expected = (int(hashes[number]) % 2**64 for hashes in (actual, sent))
        raise Corrupted(
            f"{each} from trainer rank {source} arrived with checksum {found:016x}, was sent with {expected:016x}"
        )


def _view(buffer: Tensor, offset: int, each: HfSlice, dtypes: Dtypes) -> Tensor:
    nbytes = payload_bytes([each], dtypes)
    return buffer[offset : offset + nbytes].view(dtypes[each.hf_name]).view(each.rect.size)


def _offsets(slices: Sequence[HfSlice], dtypes: Dtypes) -> list[int]:
    """Where each slice starts, and behind them where the checksums start."""
    offsets = [0]
    for each in slices:
        offsets.append(offsets[-1] + -(-payload_bytes([each], dtypes) // ALIGNMENT) * ALIGNMENT)
    return offsets
