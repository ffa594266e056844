"""The loss whose gradient is the preset's:  -sum_t sg[w_t M_t c_t] A_t grad log pi_theta(y_t) / denominator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megarl.objective.aggregate import divisors
from megarl.objective.choices import find
from megarl.objective.metrics import Sums, mean, staleness_metrics, unmasked
from megarl.objective.presets import ObjectiveConfig
from megarl.objective.tokens import Tokens


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
    """(loss [], metrics) of packed tokens; every tensor is [T]. The loss is to be minimised.

    logprobs, old_logprobs, rollout_logprobs: log pi_theta (the only input with a gradient, besides entropy), log
        pi_old, log mu of the token at the same index as target.
    advantages: A of the token's response, or of the token under GAE.
    mask: 1 on response tokens. Elsewhere any input may hold anything, NaN included.
    seq_ids, group_ids: int64, the response and the prompt of a token; any numbers, whole responses only, negative
        marks padding. group_ids are needed by the denominator group_tokens alone.
    ref_logprobs, entropy: needed where kl_coef, entropy_coef are not 0.
    denominator: None divides by the counts of this call. A scalar is the count over the mini-batch of what
        config.denominator counts (responses, tokens or groups; 1.0 gives the unnormalised sum); under group_tokens
        groups must then be whole in a call. A [T] tensor is the whole divisor of each token, `denominators(...)`
        spread over tokens, and allows any split.

    The loss's value is a surrogate (weights are constants), so compare gradients between objectives, not values.
    Metrics: loss/*, staleness/*, policy/entropy of docs/objective.md in the form of metrics.Sums, independent of
    `denominator`; loss/value under group_tokens takes groups to be whole in a call. Raises ValueError where an input
    that the config needs is missing. The mathematics, with its sources: docs/objective.md; the default, MiniRL, is
    arXiv 2512.01374 eq 7.
    """
    rows = unmasked(mask)  # [R]: whatever stands elsewhere is never read
    logprobs, old, mu, adv = (x.index_select(0, rows) for x in (logprobs, old_logprobs, rollout_logprobs, advantages))
    tokens = Tokens(logprobs.detach(), old.detach(), mu.detach(), adv.detach().to(logprobs), seq_ids[rows])
    gate = _gate(tokens, config)
    terms = (gate.weight * tokens.advantages).masked_fill_(~gate.passed, 0.0).neg_() * logprobs
    metrics: Sums = {}
    if config.kl_coef:
        kl = _reference_kl(logprobs, ref_logprobs, rows, config)
        terms = terms + config.kl_coef * kl
        metrics |= mean("policy/kl_reference", kl.detach().sum(dtype=torch.float64), len(rows))
    if config.entropy_coef:
        if entropy is None:
            raise ValueError(f"entropy_coef {config.entropy_coef} needs entropy")
        terms = terms - config.entropy_coef * entropy[rows]

    inner, units = divisors(rows, lambda: tokens.responses, seq_ids, group_ids, config)
    if isinstance(denominator, Tensor) and denominator.ndim == 1:
        loss = (terms / denominator[rows].to(terms)).sum()
        total = (terms.detach() / inner).sum()
    else:
        total = (terms / inner).sum()
        loss = total / (units.clamp(min=1) if denominator is None else denominator)

    metrics |= {**mean("loss/value", total, units), **_gate_metrics(gate, tokens)}
    if entropy is not None:
        metrics |= mean("policy/entropy", entropy.detach()[rows].sum(dtype=torch.float64), len(rows))
    return loss.to(logprobs.dtype), metrics


class _Gate(NamedTuple):
    """What multiplies A grad log pi_theta of each token, all [R]. weight: w c. cut: where w or c was truncated, None
    for nowhere. passed: M, false where a token is dropped.
    """

    weight: Tensor
    cut: Tensor | None
    passed: Tensor


def _gate(tokens: Tokens, config: ObjectiveConfig) -> _Gate:
    weight, cut = find("weight", config.weight)(tokens, config)
    if config.correction != "none":
        factor, corrected = find("correction", config.correction)(tokens, config)
        weight, cut = weight * factor, corrected if cut is None else cut if corrected is None else cut | corrected
    return _Gate(weight, cut, find("clip", config.clip)(tokens, config))


def _gate_metrics(gate: _Gate, tokens: Tokens) -> Sums:
    count, dropped = len(gate.weight), ~gate.passed
    return {
        **mean("loss/weight_mean", gate.weight.sum(dtype=torch.float64), count),
        **mean(
            "loss/weight_truncated_frac",
            dropped.new_zeros((), dtype=torch.int64) if gate.cut is None else gate.cut.sum(),
            count,
        ),
        **staleness_metrics(tokens.logprobs, tokens.old_logprobs),
        **mean("staleness/clip_frac_pos", (dropped & (tokens.advantages > 0)).sum(), count),
        **mean("staleness/clip_frac_neg", (dropped & (tokens.advantages < 0)).sum(), count),
    }


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """PPO's clipped value loss over tokens [T]: 0.5 max((v - R)^2,
    (clip(v, old +- clip) - R)^2) / unmasked tokens, or / denominator.
    """
    keep = mask.bool()
    values, old, target = _clean(values, keep), _clean(old_values, keep).detach(), _clean(returns, keep).detach()
    clipped = old + (values - old).clamp(-clip, clip)
    total = 0.5 * torch.maximum((values - target).square(), (clipped - target).square()).sum()
    return total / (keep.sum().clamp(min=1) if denominator is None else denominator)


def _reference_kl(logprobs: Tensor, ref_logprobs: Tensor | None, rows: Tensor, config: ObjectiveConfig) -> Tensor:
    """k3 estimate of KL(pi_theta || reference) at each unmasked token [R], with its gradient, as in GRPO, arXiv
    2402.03300 eq 4.
    """
    if ref_logprobs is None:
        raise ValueError(f"kl_coef {config.kl_coef} needs ref_logprobs")
    log_x = ref_logprobs[rows].detach() - logprobs
    return torch.expm1(log_x) - log_x


def _clean(x: Tensor, keep: Tensor) -> Tensor:
    # where, not a product: 0 * NaN is NaN, in the value and in the gradient.
    return torch.where(keep, x, 0.0)
