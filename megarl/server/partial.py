"""A slice of a checkpoint tensor that passes for the whole tensor, so
that vLLM's own weight loaders can cut their shard out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megarl.weights.rect import Rect, Shape

aten = torch.ops.aten


class PartialTensor(Tensor):
    """Shape and dtype of the whole tensor; memory of its rectangle `rect` alone, which is `local`.

    Cutting (narrow, slicing, chunk, unbind, select, unsqueeze) gives a plain tensor as soon as what is left lies inside
    the rectangle; every other operation raises, naming the tensor: it would need elements that are not here.
    """

    local: Tensor
    rect: Rect
    hf_name: str

    @staticmethod
    def __new__(  # type: ignore[misc]
        cls: type[PartialTensor], local: Tensor, rect: Rect, shape: Shape, hf_name: str
    ) -> Tensor:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        self.local, self.rect, self.hf_name = local, rect, hf_name
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PartialTensor({self.hf_name}, {self.rect.size} at {self.rect.offset} of {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cut = CUTS.get(func)
        whole = next(arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, PartialTensor))
        if cut is None or whole is not args[0]:
            raise RuntimeError(
                f"{whole!r}: vLLM's loader called {func} on a weight of which this rank received only a slice"
            )
        return cut(*args, **(kwargs or {}))


def partial_tensor(local: Tensor, rect: Rect, shape: Shape, hf_name: str) -> Tensor:
    """`local` itself where it is the whole tensor, of shape `shape`."""
    return local if rect.size == shape else PartialTensor(local, rect, shape, hf_name)


def _window(whole: PartialTensor, dim: int, first: int, length: int) -> Tensor:
    """whole[first : first + length] along `dim`; a partial tensor too
    is cut in the axis alone, so that cuts may follow each other.
    """
    dim %= whole.dim()
    window = Rect.whole(tuple(whole.shape)).along(dim, first, length)
    rect = whole.rect.intersect(window) or whole.rect.along(dim, first, 0)
    return partial_tensor(whole.local[rect.within(whole.rect).slices], rect.within(window), window.size, whole.hf_name)


def _slice(
    whole: PartialTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    if step != 1:
        raise RuntimeError(f"{whole!r}: vLLM's loader cut it with step {step}")
    first, last, _ = slice(start, end).indices(whole.shape[dim])
    return _window(whole, dim, first, max(last - first, 0))


def _split(whole: PartialTensor, size: int, dim: int = 0) -> list[Tensor]:
    return [
        _window(whole, dim, first, min(size, whole.shape[dim] - first)) for first in range(0, whole.shape[dim], size)
    ]


def _select(whole: PartialTensor, dim: int, index: int) -> Tensor:
    dim %= whole.dim()
    row = _window(whole, dim, index % whole.shape[dim], 1)
    if not isinstance(row, PartialTensor):
        return row.select(dim, 0)
    if not row.rect.size[dim]:
        raise RuntimeError(
            f"{whole!r}: vLLM's loader asked for index {index} of axis {dim}, which this rank did not receive"
        )
    rect = Rect(_without(row.rect.offset, dim), _without(row.rect.size, dim))
    return PartialTensor(row.local.select(dim, 0), rect, _without(tuple(row.shape), dim), row.hf_name)


def _unbind(whole: PartialTensor, dim: int = 0) -> list[Tensor]:
    return [_select(whole, dim, index) for index in range(whole.shape[dim])]


def _unsqueeze(whole: PartialTensor, dim: int) -> Tensor:
    dim %= whole.dim() + 1
    offset, size, shape = (
        (*axes[:dim], entry, *axes[dim:])
        for axes, entry in ((whole.rect.offset, 0), (whole.rect.size, 1), (tuple(whole.shape), 1))
    )
    return PartialTensor(whole.local.unsqueeze(dim), Rect(offset, size), shape, whole.hf_name)


def _detach(whole: PartialTensor) -> Tensor:
    return whole


def _without(axes: Shape, dim: int) -> Shape:
    return (*axes[:dim], *axes[dim + 1 :])


CUTS: dict[Any, Callable[..., Any]] = {
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.unsqueeze.default: _unsqueeze,
    aten.detach.default: _detach,
}
