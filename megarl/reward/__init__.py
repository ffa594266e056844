"""Rewards: functions (response_text, answer, prompt_text) -> float, by name or by dotted path."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

from megarl.dotted import import_dotted
from megarl.errors import UserError
from megarl.reward.builtin import digit_sum, exact_match, math_verify

Reward = Callable[[str, str, str], float]

BUILT_IN: dict[str, Reward] = {"digit_sum": digit_sum, "exact_match": exact_match, "math_verify": math_verify}
FAST = ("digit_sum", "exact_match")  # cannot fail or hang: megarl.reward.pool leaves them in the trainer

__all__ = ["BUILT_IN", "FAST", "Reward", "get_reward"]


def get_reward(name: str) -> Reward:
    """A built-in reward, or the function at the dotted path
    `package.module.function` (modules of the working directory are found).

    Raises UserError, one line, for a name that is neither. The returned function gives a finite float, or raises
    UserError naming the sample for which the reward gave anything else.
    """
    function = BUILT_IN[name] if name in BUILT_IN else import_dotted("data.reward", name, "function", BUILT_IN)
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


def _need_math_verify() -> None:
    try:
        importlib.import_module("math_verify")
    except ImportError:
        raise UserError(
            "data.reward 'math_verify' needs the package math-verify; pip install 'math-verify[antlr4_13_2]'"
        ) from None
