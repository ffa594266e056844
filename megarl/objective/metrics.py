"""Metrics in a form that can be reduced over micro-batches and ranks before anything is divided.

`Sums` maps "name:sum", "name:count" and "name:max" to float64 scalars:
sums and counts add up, maxima are maxed, `finish` divides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Sums = dict[str, Tensor]


def mean(name: str, total: Tensor, count: Tensor | float) -> Sums:
    total = total.detach().double()
    return {
        f"{name}:sum": total,
        f"{name}:count": count.double() if isinstance(count, Tensor) else total.new_full((), count),
    }


def unmasked(mask: Tensor) -> Tensor:
    """int64 [R]: where the mask is not 0."""
    return mask.bool().nonzero().flatten()


def merge(total: Sums, part: Sums) -> Sums:
    """Both together; a key that only one of them has is kept."""
    merged = dict(total)
    for key, value in part.items():
        if key in merged:
            value = torch.maximum(merged[key], value) if key.endswith(":max") else merged[key] + value
        merged[key] = value
    return merged


def finish(reduced: Sums) -> dict[str, float]:
    """name -> value, after all reduction. A mean over nothing is NaN."""
    values = {}
    for key, value in reduced.items():
        name, _, kind = key.rpartition(":")
        if kind == "max":
            values[name] = float(value)
        elif kind == "sum":
            count = float(reduced[f"{name}:count"])
            values[name] = float(value) / count if count else math.nan
    return values


def mismatch_metrics(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, is_cap: float) -> Sums:
    """The training-inference discrepancy rho = pi_old/mu over response
    tokens: mismatch/* of docs/objective.md. All [T].

    k1 = log mu - log pi_old and k3 = rho - 1 - log rho, both means over
    mu's samples of KL(mu || pi_old). Call it once a global batch.
    """
    rows = unmasked(mask)
    old, mu = (x.detach().index_select(0, rows).double() for x in (old_logprobs, rollout_logprobs))
    log_rho = old.sub_(mu)
    rho, away = log_rho.exp(), log_rho.abs()
    return {
        **mean("mismatch/kl_k1", -log_rho.sum(), len(rows)),
        **mean("mismatch/kl_k3", _k3(log_rho).sum(), len(rows)),
        "mismatch/abs_logprob_diff_max:max": _max(away),
        **mean("mismatch/extreme_frac_2", (away > math.log(2)).sum(), len(rows)),
        **mean("mismatch/is_weight_mean", rho.clamp(max=is_cap).sum(), len(rows)),
        **mean("mismatch/is_truncated_frac", (rho > is_cap).sum(), len(rows)),
    }


def staleness_metrics(logprobs: Tensor, old_logprobs: Tensor) -> Sums:
    """The staleness r = pi_theta/pi_old over R response tokens: KL(pi_old || pi_theta) by k3, and the largest r."""
    log_r = logprobs.detach().double().sub_(old_logprobs.detach().double())
    return {
        **mean("staleness/kl_k3", _k3(log_r).sum(), len(log_r)),
        "staleness/ratio_max:max": _max(log_r).exp() * bool(len(log_r)),
    }


def _k3(log_x: Tensor) -> Tensor:
    # expm1 in float64: exp(x) - 1 - x in float32 has an error of 6e-8, above the 1e-9 that a healthy run shows.
    return torch.expm1(log_x).sub_(log_x)


def _max(x: Tensor) -> Tensor:
    return x.max() if x.numel() else x.new_zeros(())
