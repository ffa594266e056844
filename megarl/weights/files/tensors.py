"""Tensors from the bits of files, and bits from tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.weights.files.raw_file import Bits


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_of(bits: Bits, dtype: str) -> Tensor:
    """Over the same memory."""
    return torch.from_numpy(bits).view(getattr(torch, dtype))


def bits_of(tensor: Tensor) -> Bits:
    """Row after row, on the CPU."""
    there = tensor.detach().cpu().contiguous()
    bits: Bits = there.view(getattr(torch, f"uint{8 * there.itemsize}")).numpy()
    return bits
