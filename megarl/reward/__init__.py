"""Rewards: functions (response_text, answer, prompt_text) -> float, by name or by dotted path."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
from collections.abc import Callable

from megarl.errors import UserError
from megarl.reward.builtin import digit_sum, exact_match, math_verify

Reward = Callable[[str, str, str], float]

BUILT_IN: dict[str, Reward] = {"digit_sum": digit_sum, "exact_match": exact_match, "math_verify": math_verify}

__all__ = ["BUILT_IN", "Reward", "get_reward"]


def get_reward(name: str) -> Reward:
    """A built-in reward, or the function at the dotted path `package.module.function` (modules of the working directory are found).

    Raises UserError, one line, for a name that is neither. The returned function gives a finite float, or raises UserError naming the
    sample for which the reward gave anything else.
    """
    function = BUILT_IN[name] if name in BUILT_IN else _import(name)
    if name == "math_verify":
        _need_math_verify()

    def reward(response_text: str, answer: str, prompt_text: str) -> float:
        value = function(response_text, answer, prompt_text)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            sample = f"prompt {prompt_text[-80:]!r}, response {response_text[:80]!r}, answer {answer!r}"
            raise UserError(f"data.reward {name!r} gave {value!r} for {sample}; a reward is a finite number")
        return number

    return reward


def _import(name: str) -> Reward:
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; choose one of {', '.join(BUILT_IN)} or a dotted path module.function"
        raise UserError(f"data.reward {name!r} is unknown{hint}")
    if os.getcwd() not in sys.path:  # a console script does not look there, `python -m` does
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        raise UserError(
            f"data.reward {name!r}: importing {module_name!r} failed ({type(error).__name__}: {error}); check the path"
        ) from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"data.reward {name!r}: module {module_name!r} has no function {attribute!r}; give module.function")
    return function


def _need_math_verify() -> None:
    try:
        importlib.import_module("math_verify")
    except ImportError:
        raise UserError("data.reward 'math_verify' needs the package math-verify; pip install 'math-verify[antlr4_13_2]'") from None
