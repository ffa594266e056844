"""Floating-point operations of the operators that matter: matrix products and attention, by torch's own formulas where
it has them. Attention is causal: half of the square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Formula = Callable[..., int]
_known: dict[Any, Formula | None] = {}


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Of one call; 0 for an operator that multiplies no matrices."""
    if func not in _known:
        _known[func] = _formula(func)
    formula = _known[func]
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def _formula(func: Any) -> Formula | None:
    name = func._schema.name
    if name.endswith("::_grouped_mm"):
        return _grouped
    if name == "torch_attn::_varlen_attn":
        return lambda q, k, v, edges, key_edges, longest, *rest, **more: _packed(q, longest, 2)
    if name == "torch_attn::_varlen_attn_backward":
        return lambda grad, q, k, v, out, lse, edges, key_edges, longest, *rest, **more: _packed(q, longest, 5)
    known = flop_registry.get(func._overloadpacket)
    if known is None or "attention" not in name:
        return known
    return lambda *args, **kwargs: known(*args, **kwargs) // 2


def _grouped(a: Any, b: Any, *rest: Any, **more: Any) -> int:
    """Of all groups together: rows [N, i] by [E, i, o], or [i, N] by [N, o]."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1]


def _packed(query_THD: Any, longest: int, products: int) -> int:
    """Over sequences of one length, as the simulation's are."""
    rows, heads, width = query_THD.shape
    return 2 * products * rows * (longest // 2) * heads * width
