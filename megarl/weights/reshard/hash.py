"""The checksum of a tensor's bytes that sender and receiver of a weight sync compare (XXH3, 64 bits)."""

from __future__ import annotations

import numpy as np
import torch
import xxhash


def tensor_hash(tensor: torch.Tensor) -> int:
    """XXH3-64 of the tensor's bytes in row-major order, whatever its device, dtype or strides."""
    return bytes_hash(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())


def bytes_hash(raw: np.ndarray) -> int:
    """XXH3-64 of uint8 [n], contiguous."""
    return xxhash.xxh3_64_intdigest(raw.data)
