"""The checksum of a tensor's bytes that sender and receiver of a weight sync compare: 64 bits, XXH3 in host memory, a
weighted sum of words where the bytes lie on a device. Both ends are of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

CHUNK = 2**24  # words that a device weighs at a time: some four temporaries of 128 MB
WORD = 8  # bytes
STEP = 0x9E3779B97F4A7C15 - 2**64  # odd, so that places have weights of their own


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """int64 [n]: of each tensor's bytes in row-major order, whatever its dtype or strides, on the device of the first.
    On a GPU nothing waits for it.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.int64)
    if on_device(tensors[0]):
        return _device_checksums(tensors)
    return torch.from_numpy(np.array([tensor_hash(tensor) for tensor in tensors], np.uint64).view(np.int64))


def on_device(tensor: Tensor) -> bool:
    return tensor.is_cuda


def tensor_hash(tensor: Tensor) -> int:
    """XXH3-64."""
    return xxhash.xxh3_64_intdigest(_bytes(tensor).cpu().numpy().data)


def device_hash(tensor: Tensor) -> Tensor:
    """int64 []: the sum over words of 8 bytes, mixed, of each times an odd weight of its place, and the length, modulo
    2**64. A change within one word always changes it.
    """
    return _device_hashes([tensor])[0]


def _device_checksums(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one size together: of thousands of experts a call for each costs more than its bytes."""
    by_size: dict[int, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_size.setdefault(tensor.nbytes, []).append(i)
    hashes: list[Tensor] = [tensors[0]] * len(tensors)
    for size, members in by_size.items():
        together = max(1, CHUNK // max(1, -(-size // WORD)))
        for start in range(0, len(members), together):
            part = members[start : start + together]
            for i, found in zip(part, _device_hashes([tensors[i] for i in part]).unbind(), strict=True):
                hashes[i] = found
    return torch.stack(hashes)


def _device_hashes(tensors: Sequence[Tensor]) -> Tensor:
    """int64 [n], of tensors of one size in bytes."""
    rows = [_words(_bytes(tensor)) for tensor in tensors]
    words = rows[0][None] if len(rows) == 1 else torch.stack(rows)
    total = torch.full((len(rows),), tensors[0].nbytes, dtype=torch.int64, device=words.device)
    for start in range(0, words.shape[1], CHUNK):
        part = words[:, start : start + CHUNK]
        place = torch.arange(start, start + part.shape[1], device=words.device)
        mixed = part ^ (part >> 29 & 2**35 - 1)  # else the highest bits of two words would cancel out
        total += (mixed * (place * STEP | 1)).sum(1)
    return total


def _words(raw: Tensor) -> Tensor:
    """int64, zeros after the last byte."""
    padded = F.pad(raw, (0, -raw.numel() % WORD))
    return (padded.clone() if padded.storage_offset() % WORD else padded).view(torch.int64)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
