"""Results of operators that were seen before: the same operator on the same shapes gives the same shapes. torch's own
cache of fake results does the same more slowly, and a layer is some hundreds of operators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
Key = tuple[Any, ...]


class _Made(NamedTuple):
    """One tensor that an operator makes. offset: where it begins in the memory of the first argument; None in one of
    its own.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int | None


class Results:
    """Of operators that make new tensors or views of their first argument, or write into it and return it."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._made: dict[Key, tuple[type, tuple[_Made | None, ...]] | None] = {}  # None: the first argument
        self._kinds: dict[Any, str] = {}  # of an operator: new, view, written, other

    def key(self, func: Any, args: Any, kwargs: Any) -> Key | None:
        """None for an operator whose result must be worked out each time."""
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if kind == "other":
            return None
        try:
            at = args[0].storage_offset() if kind == "view" else 0
            return (func, at, _described(args), _described(tuple(kwargs.items())) if kwargs else None)
        except TypeError:
            return None

    def find(self, key: Key, args: Any) -> tuple[bool, Any]:
        """(whether it is known, the result)."""
        if key not in self._made:
            return False, None
        made = self._made[key]
        if made is None:
            return True, args[0]
        kind, parts = made
        if kind is FakeTensor:
            return True, self._make(parts[0], args)
        return True, kind(self._make(part, args) for part in parts)

    def keep(self, key: Key, args: Any, out: Any) -> None:
        kind = self._kinds[key[0]]
        if kind == "written":
            if out is args[0]:
                self._made[key] = None
            return
        parts = out if type(out) in (tuple, list) else (out,)
        made = tuple(None if part is None else _made(part, args[0] if kind == "view" else None) for part in parts)
        if all(new is not None or part is None for new, part in zip(made, parts, strict=True)):
            self._made[key] = type(out), made

    def _make(self, made: _Made | None, args: Any) -> FakeTensor | None:
        if made is None:
            return None
        if made.offset is None:
            plain = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
        else:
            plain = torch.empty(0, dtype=made.dtype, device="meta")
            plain.set_(args[0].untyped_storage(), made.offset, made.shape, made.stride)
        return FakeTensor(self._mode, plain, made.device)


def _kind(func: Any) -> str:
    schema = func._schema
    if func.namespace not in ("aten", "prims") or torch.Tag.dynamic_output_shape in func.tags:
        return "other"
    if func is torch.ops.aten.index.Tensor:  # a mask's numbers decide
        return "other"
    returns = [one.alias_info for one in schema.returns]
    first = schema.arguments[0].alias_info if schema.arguments else None
    if not schema.is_mutable:
        if returns and not any(returns):
            return "new"
        return "view" if first is not None and returns and all(returns) else "other"
    others = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments[1:])
    name = schema.name.removeprefix("aten::")
    if first is None or others or len(returns) != 1 or returns[0] is None or name.startswith(("resize", "set_")):
        return "other"
    return "written"


def _described(x: Any) -> Any:
    """Hashable. TypeError for what is neither a tensor nor a plain value."""
    if isinstance(x, FakeTensor):
        return x.shape, x.stride(), x.dtype, x.fake_device
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, "host"
    if isinstance(x, (list, tuple)):
        return tuple([_described(part) for part in x])
    if isinstance(x, PLAIN):
        return type(x), x  # 1, 1.0 and True are one key
    raise TypeError


def _made(x: Any, base: Any) -> _Made | None:
    """base: what x is a view of, None where it is new. None for what an empty tensor of these strides would not be."""
    if not isinstance(x, FakeTensor) or x.layout is not torch.strided:
        return None
    if base is not None:
        same = isinstance(base, FakeTensor) and x.untyped_storage()._cdata == base.untyped_storage()._cdata
        return _Made(x.shape, x.stride(), x.dtype, x.fake_device, int(x.storage_offset())) if same else None
    again = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    if x.storage_offset() or again.untyped_storage().nbytes() != x.untyped_storage().nbytes():
        return None
    return _Made(x.shape, x.stride(), x.dtype, x.fake_device, None)
