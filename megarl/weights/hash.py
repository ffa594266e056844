"""The checksum of a tensor's bytes that sender and receiver of a weight sync compare (XXH3, 64 bits)."""

from __future__ import annotations

import torch
import xxhash


def tensor_hash(tensor: torch.Tensor) -> str:
    """Hexadecimal XXH3-64 of the tensor's bytes in row-major order, whatever its device, dtype or strides."""
    raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_hexdigest(raw.numpy().data)
