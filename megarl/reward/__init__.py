"""Rewards: functions of what megarl.reward.inputs names, to a number; by name or by dotted path."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from megarl.dotted import import_dotted
from megarl.errors import UserError
from megarl.reward.builtin import digit_sum, exact_match, math_verify
from megarl.reward.inputs import RewardInput, Wanted, wanted_by

BUILT_IN: dict[str, Callable[..., Any]] = {
    "digit_sum": digit_sum,
    "exact_match": exact_match,
    "math_verify": math_verify,
}
FAST = ("digit_sum", "exact_match")  # cannot fail or hang: megarl.reward.pool leaves them in the trainer

__all__ = ["BUILT_IN", "FAST", "Reward", "RewardInput", "Wanted", "answer_fault", "get_reward"]


class Reward:
    """A reward function, called by the names of its parameters (`wanted`)."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function, self.wanted = name, function, wanted_by(name, function)

    def __call__(self, sample: RewardInput) -> float:
        return self.value(self.wanted.of(sample, self.name))

    def value(self, arguments: Mapping[str, Any]) -> float:
        """A finite float. Raises UserError where the function gives anything else."""
        given = self.function(**arguments)
        value = given
        if isinstance(given, dict):
            value = given.get("score", given.get("reward"))
            if value is None:
                keys = ", ".join(map(repr, given)) or "none"
                raise UserError(f"data.reward {self.name!r} gave a dict with the keys {keys}; it needs 'score'")
        if inspect.isawaitable(given):
            raise UserError(f"data.reward {self.name!r} gave an awaitable; give a plain function")
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            shown = ", ".join(f"{name} {_short(arguments[name])}" for name in arguments if _is_short(arguments[name]))
            raise UserError(f"data.reward {self.name!r} gave {_short(given)} for {shown}; a reward is a finite number")
        return number


def get_reward(name: str) -> Reward:
    """A built-in reward, or the function at the dotted path
    `package.module.function` (modules of the working directory are found).

    Raises UserError, one line, for a name that is neither, and for a function that cannot be called by name.
    """
    if name == "math_verify" and importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "data.reward 'math_verify' needs the package math-verify; pip install 'math-verify[antlr4_13_2]'"
        )
    function = BUILT_IN[name] if name in BUILT_IN else import_dotted("data.reward", name, "function", BUILT_IN)
    return Reward(name, function)


def answer_fault(reward: str, answer: str) -> str:
    """Why `reward` can judge no response by this answer; "" where it can, or nobody knows."""
    if reward in FAST:  # a response without an end of its thoughts would equal a blank answer
        return "" if answer.strip() else f"is blank; give the answer (data.reward {reward})"
    if reward != "math_verify":
        return ""
    from megarl.reward.maths import fault_of_gold

    fault = fault_of_gold(answer)
    return f"{fault} (data.reward math_verify)" if fault else ""


def _is_short(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _short(value: Any) -> str:
    """The end of a long text stands for a prompt, the beginning for all else; one line either way."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:60]}..."
