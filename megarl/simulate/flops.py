"""Floating-point operations of the operators that matter: matrix products and attention, by torch's own formulas where
it has them. Attention is causal: half of the square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from megarl.simulate.numbers import known

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
        return lambda q, k, v, *edges, **more: _packed(q, *edges[:3], products=2)
    if name == "torch_attn::_varlen_attn_backward":
        return lambda grad, q, k, v, out, lse, *edges, **more: _packed(q, *edges[:3], products=5)
    theirs = flop_registry.get(func._overloadpacket)
    if theirs is None or "attention" not in name:
        return theirs
    return lambda *args, **kwargs: theirs(*args, **kwargs) // 2


def _grouped(a: Any, b: Any, *rest: Any, **more: Any) -> int:
    """Of all groups together: rows [N, i] by [E, i, o], or [i, N] by [N, o]."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1]


def _packed(query_THD: Any, edges: Any, key_edges: Any, longest: int, *, products: int) -> int:
    """The last query of a segment sees all of its keys. Where nobody knows the edges the segments are of one length."""
    rows, heads, width = query_THD.shape
    at, keys_at = known(edges), known(key_edges)
    pairs = rows * longest / 2
    if at is not None and keys_at is not None:
        queries, keys = at.diff(), keys_at.diff()
        pairs = float((queries * (keys - queries / 2)).sum())
    return int(2 * products * pairs * heads * width)
