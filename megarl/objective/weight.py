"""The weight w of a token's gradient: each function is (tokens, config) -> Factor. r = pi_theta/pi_old."""

from __future__ import annotations

import torch

from megarl.objective.presets import ObjectiveConfig
from megarl.objective.tokens import Factor, Tokens, exp


def one(tokens: Tokens, config: ObjectiveConfig) -> Factor:
    """w = 1: REINFORCE."""
    return Factor(torch.ones_like(tokens.logprobs))


def importance(tokens: Tokens, config: ObjectiveConfig) -> Factor:
    """w = min(pi_theta/mu, is_cap): MiniRL, arXiv 2512.01374 eq 7.

    With is_cap 1e4, which stands for none, the weight of DPPO, arXiv 2602.04879 eq 12 and 23; its authors' scripts
    take the same cap.
    """
    weight = exp(tokens.logprobs - tokens.rollout_logprobs)
    return Factor(weight.clamp(max=config.is_cap), weight > config.is_cap)


def ratio(tokens: Tokens, config: ObjectiveConfig) -> Factor:
    """w = r: the gradient of r A, where PPO does not clip."""
    return Factor(exp(tokens.log_ratio))


def clipped_ratio(tokens: Tokens, config: ObjectiveConfig) -> Factor:
    """w = clip(r, 1 - eps_low, 1 + eps_high), and no token is dropped: CISPO, arXiv 2506.13585 eq 5.

    The paper imposes no lower bound (eps_low 1 here, since r > 0) and does not tell its upper one.
    """
    r = exp(tokens.log_ratio)
    weight = r.clamp(1 - config.eps_low, 1 + config.eps_high)
    return Factor(weight, weight != r)


def sequence_ratio(tokens: Tokens, config: ObjectiveConfig) -> Factor:
    """w = s = (pi_theta(y)/pi_old(y))^(1/|y|): GSPO, arXiv 2507.18071. Its 1/|y| is the denominator's."""
    return Factor(exp(tokens.response_mean(tokens.log_ratio)))


def soft_gate(tokens: Tokens, config: ObjectiveConfig) -> Factor:
    """w = 4 p (1 - p) r = d/dr [4/tau p] r, p = sigmoid(tau (r - 1)): SAPO, arXiv 2511.20347, whose J is the mean of
    4/tau p A. tau = tau_pos where A > 0, else tau_neg.
    """
    r = exp(tokens.log_ratio)
    tau = torch.where(tokens.advantages > 0, r.new_tensor(config.tau_pos), r.new_tensor(config.tau_neg))
    x = tau * (r - 1)
    return Factor(4 * torch.sigmoid(x) * torch.sigmoid(-x) * r)
