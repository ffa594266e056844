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

CHUNK = 2**24  # words that a device weighs at a time: 128 MB of temporaries
STEP = 0x9E3779B97F4A7C15 - 2**64  # odd, so that places have weights of their own


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """int64 [n]: of each tensor's bytes in row-major order, whatever its dtype or strides, on the device of the first.
    On a GPU nothing waits for it.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.int64)
    if on_device(tensors[0]):
        return torch.stack([device_hash(tensor) for tensor in tensors])
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
    raw = _bytes(tensor)
    words = F.pad(raw, (0, -raw.numel() % 8))
    words = (words.clone() if words.storage_offset() % 8 else words).view(torch.int64)
    total = torch.full((), raw.numel(), dtype=torch.int64, device=raw.device)
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK]
        place = torch.arange(start, start + len(part), device=raw.device)
        mixed = part ^ (part >> 29 & 2**35 - 1)  # else the highest bits of two words would cancel out
        total += (mixed * (place * STEP | 1)).sum()
    return total


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
