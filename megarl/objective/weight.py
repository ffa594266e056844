"""The weight w and the mask M of a token's gradient. Both are constants
to autograd: every input is detached by the caller.

Arguments, of the R unmasked tokens: log_ratio [R] = log pi_theta - log pi_old, log_is
[R] = log pi_theta - log mu, advantages [R], all finite; `mean_log_ratio` gives the
mean of log_ratio over each response, spread over its tokens [R]. r = exp(log_ratio).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megarl.objective.presets import ObjectiveConfig

# exp of this is finite in float32, and so is its product with a weight: inf * 0 would be NaN.
LOG_MAX = 60.0


def exp(log_x: Tensor) -> Tensor:
    return log_x.clamp(max=LOG_MAX).exp_()


def token_weight(
    log_ratio: Tensor, log_is: Tensor, advantages: Tensor, mean_log_ratio: Callable[[], Tensor], config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """(w [R], bool [R] where w was cut).

    is              min(pi_theta/mu, is_cap): MiniRL, arXiv 2512.01374 eq 7. With is_cap 1e4, which
                    stands for none, DPPO, arXiv 2602.04879 eq 12 and 23 (its authors' scripts take the same cap)
    ratio           r: the gradient of r A where PPO does not clip
    clipped_ratio   clip(r, 1 - eps_low, 1 + eps_high): CISPO, arXiv 2506.13585 eq 5. The paper imposes no lower
                    bound (eps_low 1 here, since r > 0) and does not tell its upper one
    sequence_ratio  s = (pi_theta(y)/pi_old(y))^(1/|y|); 1/|y| is the denominator's: GSPO, arXiv 2507.18071
    soft_gate       4 p (1 - p) r = d/dr [4/tau p] r with p = sigmoid(tau (r - 1)): SAPO, arXiv 2511.20347, whose
                    J is the mean of 4/tau p A; tau = tau_pos where A > 0, else tau_neg
    """
    uncut = torch.zeros_like(log_ratio, dtype=torch.bool)
    if config.weight == "one":
        return torch.ones_like(log_ratio), uncut
    if config.weight == "is":
        weight = exp(log_is)
        return weight.clamp(max=config.is_cap), weight > config.is_cap
    if config.weight == "sequence_ratio":
        return exp(mean_log_ratio()), uncut
    ratio = exp(log_ratio)
    if config.weight == "clipped_ratio":
        weight = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
        return weight, weight != ratio
    if config.weight == "soft_gate":
        tau = torch.where(advantages > 0, ratio.new_tensor(config.tau_pos), ratio.new_tensor(config.tau_neg))
        x = tau * (ratio - 1)
        return 4 * torch.sigmoid(x) * torch.sigmoid(-x) * ratio, uncut
    return ratio, uncut


def kept(
    log_ratio: Tensor,
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mean_log_ratio: Callable[[], Tensor],
    config: ObjectiveConfig,
) -> Tensor:
    """M as bool [R]: false where the update would go on leaving the trust region, in the direction of A.

    ratio, sequence_ratio   A > 0 and x > 1 + eps_high, or A < 0 and x < 1 - eps_low. x is r (MiniRL; the unclipped
                            branch of PPO's min(r A, clip(r) A) has the same tokens) or the sequence ratio s (GSPO)
    tv                      A > 0 and pi_theta - mu > tv_delta, or A < 0 and pi_theta - mu < -tv_delta: DPPO with the
                            binary total variation |pi_theta(y_t) - mu(y_t)|, arXiv 2602.04879 eq 12 and 13. Trust
                            region and weight (`is`) both refer to the rollout policy mu, not to pi_old. The paper
                            takes tv_delta 0.15, public codes 0.15 to 0.2
    """
    if config.clip == "none":
        return torch.ones_like(log_ratio, dtype=torch.bool)
    if config.clip == "tv":
        move, low, high = exp(logprobs) - exp(rollout_logprobs), -config.tv_delta, config.tv_delta
    else:
        move = exp(log_ratio if config.clip == "ratio" else mean_log_ratio())
        low, high = 1 - config.eps_low, 1 + config.eps_high
    return ~torch.where(advantages > 0, move > high, (move < low) & (advantages < 0))
