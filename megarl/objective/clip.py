"""The mask M of a token's gradient: each function is (tokens, config) -> bool [R], false where a token is dropped.

A token is dropped where the update would go on leaving the trust region: away from it in the direction of A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.objective.presets import ObjectiveConfig
from megarl.objective.tokens import Tokens, exp


def within(x: Tensor, low: float, high: float, advantages: Tensor) -> Tensor:
    """bool [R]: not (A > 0 and x > high), and not (A < 0 and x < low)."""
    return ~torch.where(advantages > 0, x > high, (x < low) & (advantages < 0))


def none(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """All tokens are kept."""
    return torch.ones_like(tokens.logprobs, dtype=torch.bool)


def ratio(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """r within [1 - eps_low, 1 + eps_high]: MiniRL, and the unclipped branch of PPO's min(r A, clip(r) A)."""
    return within(exp(tokens.log_ratio), 1 - config.eps_low, 1 + config.eps_high, tokens.advantages)


def sequence_ratio(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """The same of the sequence ratio (pi_theta(y)/pi_old(y))^(1/|y|): GSPO."""
    s = exp(tokens.response_mean(tokens.log_ratio))
    return within(s, 1 - config.eps_low, 1 + config.eps_high, tokens.advantages)


def tv(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """pi_theta - mu within +- tv_delta: DPPO with the binary total variation, arXiv 2602.04879 eq 12 and 13.

    The trust region refers to the rollout policy mu, as the weight `is` does, not to pi_old. The paper takes 0.15,
    public codes 0.15 to 0.2.
    """
    move = exp(tokens.logprobs) - exp(tokens.rollout_logprobs)
    return within(move, -config.tv_delta, config.tv_delta, tokens.advantages)
