"""A first call of the objective's functions that are not megarl's own, on three tokens, before anything starts."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.objective.aggregate import number
from megarl.objective.choices import CHOICES, find
from megarl.objective.presets import ObjectiveConfig
from megarl.objective.tokens import Factor, Tokens

N = 3


def try_outside(config: ObjectiveConfig) -> None:
    """Raises UserError, one line that names key and function, where one cannot be imported, raises, or gives another
    type or shape than its part of an objective has (megarl.objective.choices).
    """
    for part, built_in in CHOICES.items():
        name = getattr(config, part)
        if name in built_in:
            continue
        function, key = find(part, name), f"objective.{part} {name!r}"
        wanted = {"advantage": f"a float tensor [{N}]", "clip": f"a bool tensor [{N}]"}.get(part, f"Factor of [{N}]")
        call = "(rewards, groups, config)" if part == "advantage" else "(tokens, config)"
        try:
            given = function(*_example(part), config)
        except Exception as error:  # foreign code may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"{key} failed on an example ({reason}); it is called as {call} and must give {wanted}"
            ) from None
        if not _fits(part, given):
            raise UserError(f"{key} gave {_described(given)} on an example of {N}; it must give {wanted}")


def _example(part: str) -> tuple[object, ...]:
    if part == "advantage":
        return torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), number(torch.tensor([0, 0, 1]))
    now = torch.tensor([-0.5, -1.0, -2.0])
    return (Tokens(now, now - 0.1, now + 0.1, torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0, 0, 1])),)


def _fits(part: str, given: object) -> bool:
    if part in ("weight", "correction"):
        if not isinstance(given, Factor) or not _is(given.value, floating=True):
            return False
        return given.cut is None or _is(given.cut, floating=False)
    return _is(given, floating=part == "advantage")


def _is(x: object, *, floating: bool) -> bool:
    if not isinstance(x, Tensor) or x.shape != (N,):
        return False
    return x.is_floating_point() if floating else x.dtype == torch.bool


def _described(given: object) -> str:
    if isinstance(given, Factor):
        return f"Factor({_described(given.value)}, {_described(given.cut)})"
    return f"a {given.dtype} tensor {list(given.shape)}" if isinstance(given, Tensor) else repr(given)[:80]
