"""From rewards to advantages, one a response."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.objective.aggregate import number
from megarl.objective.presets import ObjectiveConfig

STD_EPS = 1e-6


def advantages(rewards: Tensor, group_ids: Tensor, config: ObjectiveConfig) -> Tensor:
    """A(x, y) [n] from rewards [n] and the group (prompt) of each response [n], by `config.advantage`.

    `mean`: R - mean over the group (MiniRL, arXiv 2512.01374 section 4.2). `mean_std`: that over (std + 1e-6), the sample standard
    deviation (n - 1) as public GRPO codes take it; a group of one has A = 0. `reward`: R. Computed in float64, so that a group of
    equal rewards has A = 0 to rounding. Groups must be whole. Raises UserError for `gae`, which needs a critic.
    """
    if config.advantage == "gae":
        raise UserError("objective.advantage 'gae' needs a critic, which this version does not train; set objective.advantage: mean")
    if config.advantage == "reward":
        return rewards.clone()
    group, exact = number(group_ids), rewards.double()
    size = group.spread_sums(torch.ones_like(exact))
    centred = exact - group.spread_sums(exact) / size
    if config.advantage == "mean_std":
        std = (group.spread_sums(centred.square()) / (size - 1).clamp(min=1)).sqrt()
        centred = centred / (std + STD_EPS)
    return centred.to(rewards.dtype)
