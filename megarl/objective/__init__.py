"""The policy objective: pure functions of tensors. The mathematics is docs/objective.md.

loss, metrics = policy_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, seq_ids, presets["minirl"])

The names are imported when they are first used: a configuration needs
the presets only, and torch takes two seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megarl.objective.presets import ObjectiveConfig, presets, resolve_objective

if TYPE_CHECKING:
    from megarl.objective.advantage import advantages, gae, informative, overlong_penalty
    from megarl.objective.aggregate import Segments, denominators
    from megarl.objective.loss import policy_loss, value_loss
    from megarl.objective.metrics import Sums, finish, merge, mismatch_metrics, staleness_metrics
    from megarl.objective.tokens import Factor, Tokens

_HOMES = {
    **dict.fromkeys(("advantages", "gae", "informative", "overlong_penalty"), "advantage"),
    **dict.fromkeys(("Segments", "denominators"), "aggregate"),
    "policy_loss": "loss",
    "value_loss": "loss",
    **dict.fromkeys(("Sums", "finish", "merge", "mismatch_metrics", "staleness_metrics"), "metrics"),
    **dict.fromkeys(("Factor", "Tokens"), "tokens"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = [
    "Factor",
    "ObjectiveConfig",
    "Segments",
    "Sums",
    "Tokens",
    "advantages",
    "denominators",
    "finish",
    "gae",
    "informative",
    "merge",
    "mismatch_metrics",
    "overlong_penalty",
    "policy_loss",
    "presets",
    "resolve_objective",
    "staleness_metrics",
    "value_loss",
]
