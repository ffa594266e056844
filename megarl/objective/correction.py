"""Corrections of the training-inference discrepancy rho = pi_old/mu, for objectives whose weight does not hold mu."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.objective.aggregate import Segments
from megarl.objective.presets import ObjectiveConfig
from megarl.objective.weight import exp


def correction(log_rho: Tensor, seq: Segments, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """(c [R], bool [R] where c was cut or is 0), of unmasked tokens.
    log_rho [R] = log pi_old - log mu; C = correction_high.

    token_truncation      min(rho_t, C), the TIS note, one-sided
    token_mask            rho_t where correction_low <= rho_t <= C, else 0
    sequence_truncation   min(prod_t rho_t, C), one number a response
    sequence_mask         prod_t rho_t where within [correction_low, C], else 0
    geometric_rejection   1 where (prod_t rho_t)^(1/|y|) is within [correction_low, C], else 0
    """
    kind, low, high = config.correction, config.correction_low, config.correction_high
    if kind.startswith("token"):
        rho = exp(log_rho)
    else:
        total = seq.spread_sums(log_rho)
        rho = exp(total / seq.sizes() if kind == "geometric_rejection" else total)
    if kind.endswith("truncation"):
        return rho.clamp(max=high), rho > high
    outside = (rho < low) | (rho > high)
    return torch.where(outside, 0.0, torch.ones_like(rho) if kind == "geometric_rejection" else rho), outside
