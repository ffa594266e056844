"""The policy objective: pure functions of tensors, exactly as in spec/objective.md.

loss, metrics = policy_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, seq_ids, presets["minirl"])
"""

from megarl.objective.advantage import advantages
from megarl.objective.aggregate import denominators
from megarl.objective.loss import policy_loss, value_loss
from megarl.objective.metrics import Sums, finish, merge, mismatch_metrics, staleness_metrics
from megarl.objective.presets import ObjectiveConfig, presets, resolve_objective

__all__ = [
    "ObjectiveConfig",
    "Sums",
    "advantages",
    "denominators",
    "finish",
    "merge",
    "mismatch_metrics",
    "policy_loss",
    "presets",
    "resolve_objective",
    "staleness_metrics",
    "value_loss",
]
