"""The policy objective: pure functions of tensors."""

from megarl.objective.presets import ObjectiveConfig, presets, resolve_objective

__all__ = ["ObjectiveConfig", "presets", "resolve_objective"]
