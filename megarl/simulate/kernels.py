"""Operators that have a kernel of their own on a GPU, and that a torch without CUDA would take apart: the pieces keep
float32 copies that no GPU sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_library = torch.library.Library("aten", "IMPL")


def register() -> None:
    """Once a process: autograd then sees one operator each, which the mode answers by ANSWERS."""
    for operator in ANSWERS:
        _library.impl(operator, _never, "CUDA")


def _never(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("a simulated device computes nothing")


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    rows = x.shape[: x.dim() - len(shape)]
    return torch.empty_like(x), x.new_empty((*rows, *[1] * len(shape)), dtype=torch.float32)


def _rms_norm_backward(
    grad: Tensor, x: Tensor, shape: list[int], rstd: Tensor, weight: Tensor | None, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    dweight = torch.empty_like(weight) if mask[1] and weight is not None else None
    return torch.empty_like(x) if mask[0] else None, dweight


ANSWERS = {aten._fused_rms_norm.default: _rms_norm, aten._fused_rms_norm_backward.default: _rms_norm_backward}
