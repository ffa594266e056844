"""Numbers beside tensors that have none: small integers, and what is computed from them, for real on the CPU.

The engine asks its device for few numbers: how many rows go to which expert, which rows a mask keeps. They follow from
integers that start on the host, and so they can be computed beside the fake tensors. Where a router would choose
experts from scores that nobody knows, every expert gets as many rows as the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten
LARGEST = 1 << 23  # elements: a routing map of 32k rows and 256 experts, which begins as zeros in float32
EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default}
FILLED = {aten.zeros_like.default: 0, aten.ones_like.default: 1}
_written: dict[Any, list[int | str]] = {}


def known(x: Tensor) -> Tensor | None:
    """The numbers of a fake tensor on the CPU; None where nobody knows them."""
    numbers: Tensor | None = getattr(x, "_numbers", None)
    if numbers is None or hasattr(numbers.untyped_storage(), "_stale"):
        return None
    return numbers


def learn(x: Any, numbers: Any) -> None:
    """From here on the numbers of x are these."""
    if isinstance(x, FakeTensor) and isinstance(numbers, Tensor) and _small(numbers):
        x._numbers = numbers  # type: ignore[attr-defined]


def forget(x: Any) -> None:
    """x was overwritten with what nobody knows; so are the views that share its memory."""
    for part in x if isinstance(x, (list, tuple)) else [x]:
        numbers = getattr(part, "_numbers", None)
        if numbers is not None:
            numbers.untyped_storage()._stale = True
            part._numbers = None  # Adam's moments begin as known zeros: they would stay, as much as the GPU holds


def beside(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], flat: list[Any]) -> Any:
    """What the operator gives on known numbers, in the structure of its result; None where one is missing or large.
    flat: all arguments, without lists around them.
    An operator that writes in place writes into the numbers too, or makes them unknown.
    """
    result = None
    if func not in EMPTY and func.namespace in ("aten", "prims"):
        if func in FILLED or func is aten.full_like.default:
            return _filled(func, args, kwargs)
        tensors = [x for x in flat if isinstance(x, Tensor)]
        if all(_small(x) if not isinstance(x, FakeTensor) else known(x) is not None for x in tensors) and (
            tensors or _small_factory(args)
        ):
            result = _compute(func, args, kwargs)
    if result is None:
        for place in _places_written(func):
            value = kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None
            forget(value)
    return result


def balanced_routes(scores: Tensor, topk: int) -> Tensor:
    """int64 [rows, topk], ascending: all columns of scores [rows, columns] equally often."""
    rows, columns = scores.shape
    return (torch.arange(rows * topk) % columns).view(rows, topk).sort(1).values


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def real(x: Any) -> Any:
        if isinstance(x, FakeTensor):
            return known(x)
        return torch.device("cpu") if isinstance(x, torch.device) else x

    named = {key: value for key, value in tree_map(real, kwargs).items() if key != "pin_memory"}
    try:
        return func(*tree_map(real, args), **named)
    except (RuntimeError, NotImplementedError):  # an operator without a CPU kernel
        return None


def _filled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    like = args[0]
    if not _small(like):
        return None
    return torch.full(
        like.shape, FILLED.get(func, args[1] if len(args) > 1 else 0), dtype=kwargs.get("dtype") or like.dtype
    )


def _small(x: Tensor) -> bool:
    return x.numel() <= LARGEST


def _small_factory(args: tuple[Any, ...]) -> bool:
    size = 1
    for n in args[0] if args and isinstance(args[0], (list, tuple)) else ():
        size *= n
    return size <= LARGEST


def _places_written(func: Any) -> list[int | str]:
    if func not in _written:
        arguments = func._schema.arguments
        _written[func] = [
            a.name if a.kwarg_only else i
            for i, a in enumerate(arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
    return _written[func]
