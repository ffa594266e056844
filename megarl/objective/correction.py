"""The correction c of the training-inference discrepancy rho = pi_old/mu, for weights that do not hold mu themselves.

Each function is (tokens, config) -> Factor, cut where c was truncated or is 0. C = correction_high. The truncations are
one-sided, as in the TIS note ("Your efficient RL framework secretly brings you off-policy RL training").
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.objective.presets import ObjectiveConfig
from megarl.objective.tokens import Factor, Tokens, exp


def none(tokens: Tokens, config: ObjectiveConfig) -> Factor:
    """c = 1."""
    return Factor(torch.ones_like(tokens.log_rho))


def token_truncation(tokens: Tokens, config: ObjectiveConfig) -> Factor:
    """c = min(rho_t, C)."""
    return _truncated(exp(tokens.log_rho), config)


def token_mask(tokens: Tokens, config: ObjectiveConfig) -> Factor:
    """c = rho_t where correction_low <= rho_t <= C, else 0."""
    return _masked(exp(tokens.log_rho), config)


def sequence_truncation(tokens: Tokens, config: ObjectiveConfig) -> Factor:
    """c = min(prod_t rho_t, C), one number a response."""
    return _truncated(_product(tokens), config)


def sequence_mask(tokens: Tokens, config: ObjectiveConfig) -> Factor:
    """c = prod_t rho_t where that is within [correction_low, C], else 0."""
    return _masked(_product(tokens), config)


def geometric_rejection(tokens: Tokens, config: ObjectiveConfig) -> Factor:
    """c = 1 where (prod_t rho_t)^(1/|y|) is within [correction_low, C], else 0."""
    mean = exp(tokens.response_mean(tokens.log_rho))
    outside = _outside(mean, config)
    return Factor(torch.where(outside, 0.0, torch.ones_like(mean)), outside)


def _product(tokens: Tokens) -> Tensor:
    return exp(tokens.responses.spread_sums(tokens.log_rho))


def _truncated(rho: Tensor, config: ObjectiveConfig) -> Factor:
    return Factor(rho.clamp(max=config.correction_high), rho > config.correction_high)


def _masked(rho: Tensor, config: ObjectiveConfig) -> Factor:
    outside = _outside(rho, config)
    return Factor(torch.where(outside, 0.0, rho), outside)


def _outside(rho: Tensor, config: ObjectiveConfig) -> Tensor:
    return (rho < config.correction_low) | (rho > config.correction_high)
