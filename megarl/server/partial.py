"""A slice of a checkpoint tensor that passes for the whole tensor, so
that vLLM's own weight loaders can cut their shard out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


class PartialTensor(Tensor):
    """Shape and dtype of the whole tensor; memory of `held` alone, which lies at `start` in it.

    Cutting (narrow, slicing, chunk, unbind, select, unsqueeze) gives a plain tensor as soon as what is left lies inside
    the held slice; every other operation raises, naming the tensor: it would need elements that are not here.
    """

    held: Tensor
    start: tuple[int, ...]
    hf_name: str

    @staticmethod
    def __new__(  # type: ignore[misc]
        cls: type[PartialTensor], held: Tensor, start: tuple[int, ...], full: tuple[int, ...], name: str
    ) -> Tensor:
        self = Tensor._make_wrapper_subclass(cls, full, dtype=held.dtype, device=held.device)
        self.held, self.start, self.hf_name = held, start, name
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PartialTensor({self.hf_name}, {tuple(self.held.shape)} at {self.start} of {tuple(self.shape)})"

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


def partial_tensor(held: Tensor, start: tuple[int, ...], full: tuple[int, ...], name: str) -> Tensor:
    """`held` itself where it is the whole tensor."""
    return held if tuple(held.shape) == full else PartialTensor(held, start, full, name)


def _window(whole: Tensor, dim: int, first: int, length: int) -> Tensor:
    """whole[first : first + length] along `dim`; a partial tensor too
    is cut in the axis alone, so that cuts may follow each other.
    """
    assert isinstance(whole, PartialTensor)
    dim %= whole.dim()
    full = (*whole.shape[:dim], length, *whole.shape[dim + 1 :])
    begin, end = whole.start[dim], whole.start[dim] + whole.held.shape[dim]
    low, high = max(first, begin), min(first + length, end)
    held = whole.held.narrow(dim, min(low, end) - begin if low < high else 0, max(high - low, 0))
    start = (*whole.start[:dim], low - first if low < high else 0, *whole.start[dim + 1 :])
    return partial_tensor(held, start, full, whole.hf_name)


def _slice(whole: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    if step != 1:
        raise RuntimeError(f"{whole!r}: vLLM's loader cut it with step {step}")
    first, last, _ = slice(start, end).indices(whole.shape[dim])
    return _window(whole, dim, first, max(last - first, 0))


def _split(whole: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    return [
        _window(whole, dim, first, min(size, whole.shape[dim] - first)) for first in range(0, whole.shape[dim], size)
    ]


def _select(whole: Tensor, dim: int, index: int) -> Tensor:
    dim %= whole.dim()
    one = _window(whole, dim, index % whole.shape[dim], 1)
    if not isinstance(one, PartialTensor):
        return one.select(dim, 0)
    if not one.held.shape[dim]:
        raise RuntimeError(
            f"{whole!r}: vLLM's loader asked for index {index} of axis {dim}, which this rank did not receive"
        )
    return PartialTensor(
        one.held.select(dim, 0), _without(one.start, dim), _without(tuple(one.shape), dim), one.hf_name
    )


def _unbind(whole: Tensor, dim: int = 0) -> list[Tensor]:
    return [_select(whole, dim, index) for index in range(whole.shape[dim])]


def _unsqueeze(whole: Tensor, dim: int) -> Tensor:
    assert isinstance(whole, PartialTensor)
    dim %= whole.dim() + 1
    full, start = list(whole.shape), list(whole.start)
    full.insert(dim, 1)
    start.insert(dim, 0)
    return PartialTensor(whole.held.unsqueeze(dim), tuple(start), tuple(full), whole.hf_name)


def _detach(whole: Tensor) -> Tensor:
    return whole


def _without(values: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*values[:dim], *values[dim + 1 :])


CUTS: dict[Any, Callable[..., Any]] = {
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.unsqueeze.default: _unsqueeze,
    aten.detach.default: _detach,
}
