"""The loss whose gradient is the preset's:  -sum_t sg[w_t M_t c_t] A_t grad log pi_theta(y_t) / denominator."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.objective.aggregate import divisors, number
from megarl.objective.correction import correction
from megarl.objective.metrics import Sums, mean, staleness_metrics
from megarl.objective.presets import ObjectiveConfig
from megarl.objective.weight import exp, kept, token_weight


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    seq_ids: Tensor,
    config: ObjectiveConfig,
    *,
    group_ids: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Sums]:
    """(loss [], metrics) of packed tokens; every tensor is [T]. The loss is to be minimised; MiniRL is arXiv 2512.01374 eq 7.

    logprobs, old_logprobs, rollout_logprobs: log pi_theta (the only input with a gradient, besides entropy), log pi_old, log mu of the
        token at the same index as target.
    mask: 1 on response tokens. Elsewhere any input may hold anything, NaN included.
    seq_ids, group_ids: int64, the response and the prompt of a token; any numbers, whole responses only, negative marks padding.
    denominator: None divides by the counts of this call. A scalar is the count over the mini-batch of what config.denominator counts
        (responses, tokens or groups; 1.0 gives the unnormalised sum); under group_tokens groups must then be whole in a call. A [T]
        tensor is the whole divisor of each token, `denominators(...)` spread over tokens, and allows any split.

    The loss's value is a surrogate (weights are constants), so compare gradients between objectives, not values.
    Metrics: loss/*, staleness/*, policy/entropy of spec/objective.md in the form of metrics.Sums, independent of `denominator`.
    """
    keep = mask.bool()
    logprobs, old, mu, adv = (_clean(x, keep) for x in (logprobs, old_logprobs, rollout_logprobs, advantages.to(logprobs)))
    old, mu, adv, now = old.detach(), mu.detach(), adv.detach(), logprobs.detach()
    ones = keep.to(now.dtype)
    seq = number(seq_ids)

    def mean_log_ratio() -> Tensor:
        return seq.spread_sums(now - old) / seq.spread_sums(ones).clamp(min=1)

    weight, cut = token_weight(now - old, now - mu, adv, mean_log_ratio, config)
    factor, corrected = correction(old - mu, ones, seq, config)
    passed = kept(now - old, exp(now), exp(mu), adv, mean_log_ratio, config)
    terms = -torch.where(keep & passed, weight * factor, 0.0) * adv * logprobs
    terms = terms + _regularisers(logprobs, ref_logprobs, entropy, keep, config)

    inner, units = divisors(ones, seq, group_ids, config)
    total = (terms / inner).sum()
    if denominator is None:
        loss = total / units.clamp(min=1)
    elif isinstance(denominator, Tensor) and denominator.ndim == 1:
        loss = (terms / torch.where(keep, denominator, 1).to(terms)).sum()
    else:
        loss = total / denominator

    tokens = keep.sum()
    metrics = {
        **mean("loss/value", total, units),
        **mean("loss/weight_mean", torch.where(keep, weight * factor, 0.0).double().sum(), tokens),
        **mean("loss/weight_truncated_frac", (keep & (cut | corrected)).sum(), tokens),
        **staleness_metrics(now, old, keep),
        **mean("staleness/clip_frac_pos", (keep & ~passed & (adv > 0)).sum(), tokens),
        **mean("staleness/clip_frac_neg", (keep & ~passed & (adv < 0)).sum(), tokens),
    }
    if entropy is not None:
        metrics |= mean("policy/entropy", _clean(entropy.detach(), keep).double().sum(), tokens)
    return loss, metrics


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float = 0.2, denominator: float | Tensor | None = None
) -> Tensor:
    """PPO's clipped value loss over tokens [T]: 0.5 max((v - R)^2, (clip(v, old +- clip) - R)^2) / unmasked tokens, or / denominator."""
    keep = mask.bool()
    values, old, target = _clean(values, keep), _clean(old_values, keep).detach(), _clean(returns, keep).detach()
    clipped = old + (values - old).clamp(-clip, clip)
    total = 0.5 * torch.maximum((values - target).square(), (clipped - target).square()).sum()
    return total / (keep.sum().clamp(min=1) if denominator is None else denominator)


def _regularisers(logprobs: Tensor, ref_logprobs: Tensor | None, entropy: Tensor | None, keep: Tensor, config: ObjectiveConfig) -> Tensor:
    """kl_coef k3(pi_theta || reference) - entropy_coef H per token [T], with gradients; k3 as in GRPO, arXiv 2402.03300 eq 4."""
    terms = torch.zeros_like(logprobs)
    if config.kl_coef:
        if ref_logprobs is None:
            raise ValueError(f"kl_coef {config.kl_coef} needs ref_logprobs")
        log_x = _clean(ref_logprobs, keep).detach() - logprobs
        terms = terms + config.kl_coef * (torch.expm1(log_x) - log_x)
    if config.entropy_coef:
        if entropy is None:
            raise ValueError(f"entropy_coef {config.entropy_coef} needs entropy")
        terms = terms - config.entropy_coef * _clean(entropy, keep)
    return terms


def _clean(x: Tensor, keep: Tensor) -> Tensor:
    # where, not a product: 0 * NaN is NaN, in the value and in the gradient.
    return torch.where(keep, x, 0.0)
