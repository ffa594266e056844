"""Shapes that files hold against those that config.json makes, and the keys of config.json that make them.

A slice of a tensor that is too large reads without a word, and the model is another one: every reader compares whole
shapes before it reads any slice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megarl.errors import UserError
from megarl.weights.map.weight_map import WeightMap
from megarl.weights.rect import Shape

UNSET = ("head_dim", "num_key_value_heads")  # keys with a default that follows other keys


def refuse_shape(
    source: str, name: str, stored: Shape, wanted: Shape, weight_map: WeightMap, shape_of: Callable[[WeightMap], Shape]
) -> None:
    """Raises UserError unless stored == wanted. shape_of: the shape of tensor `name` in a map."""
    if stored == wanted:
        return
    keys = ", ".join(keys_behind(weight_map, shape_of, stored, wanted))
    raise UserError(
        f"model.path {source!r}: tensor {name!r} has shape {stored}, config.json wants {wanted}"
        f"{f' ({keys})' if keys else ''}; use the config.json that belongs to the weights"
    )


def keys_behind(
    weight_map: WeightMap, shape_of: Callable[[WeightMap], Shape], stored: Shape, wanted: Shape
) -> list[str]:
    """The keys of config.json, with their values, on which the axes depend in which `stored` differs from `wanted`."""
    hf_config = weight_map.hf_config
    unset: dict[str, int] = {key: 0 for key in UNSET if not hf_config.get(key)}
    sizes = {key: value for key, value in hf_config.items() if type(value) is int and value > 0} | unset
    keys = []
    for key, value in sizes.items():
        other = _shape_with(hf_config, key, 2 * value or 7, shape_of)
        if other and any(
            x != y and z != y for x, y, z in zip(stored, wanted, other, strict=False)
        ):  # axes may differ in number
            keys.append(f"{key} {value}" if value else f"{key} is not given")
    return keys


def _shape_with(
    hf_config: dict[str, Any], key: str, value: int, shape_of: Callable[[WeightMap], Shape]
) -> Shape | None:
    """The tensor's shape if config.json said so; None where there is no such model or tensor."""
    try:
        return shape_of(WeightMap({**hf_config, key: value}))
    except (UserError, KeyError, ArithmeticError):
        return None
