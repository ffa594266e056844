"""Corrections of the training-inference discrepancy rho = pi_old/mu, for objectives whose weight does not hold mu."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.objective.aggregate import Segments
from megarl.objective.presets import ObjectiveConfig
from megarl.objective.weight import exp


def correction(log_rho: Tensor, mask: Tensor, seq: Segments, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """(c [T], bool [T] where c was cut or is 0). log_rho [T] = log pi_old - log mu, 0 where masked; C = correction_high.

    token_truncation      min(rho_t, C), the TIS note, one-sided
    token_mask            rho_t where correction_low <= rho_t <= C, else 0
    sequence_truncation   min(prod_t rho_t, C), one number a response
    sequence_mask         prod_t rho_t where within [correction_low, C], else 0
    geometric_rejection   1 where (prod_t rho_t)^(1/|y|) is within [correction_low, C], else 0
    """
    kind, low, high = config.correction, config.correction_low, config.correction_high
    if kind == "none":
        return torch.ones_like(log_rho), torch.zeros_like(log_rho, dtype=torch.bool)
    if kind.startswith("token"):
        rho = exp(log_rho)
    else:
        total = seq.spread_sums(log_rho)
        rho = exp(total / seq.spread_sums(mask).clamp(min=1) if kind == "geometric_rejection" else total)
    if kind.endswith("truncation"):
        return rho.clamp(max=high), rho > high
    outside = (rho < low) | (rho > high)
    return torch.where(outside, 0.0, torch.ones_like(rho) if kind == "geometric_rejection" else rho), outside
