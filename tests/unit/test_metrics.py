"""The mismatch and staleness metrics against loops, and their reduction."""

from __future__ import annotations

import math

import pytest
import torch

from megarl.objective import finish, merge, mismatch_metrics, staleness_metrics


def test_mismatch_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    old, mu = -2 * torch.rand(2, 50, generator=generator)
    mask = (torch.rand(50, generator=generator) < 0.7).float()
    pairs = [(float(a), float(b)) for a, b, m in zip(old, mu, mask) if m]
    rho = [math.exp(a - b) for a, b in pairs]
    n = len(pairs)
    expected = {
        "mismatch/kl_k1": sum(b - a for a, b in pairs) / n,
        "mismatch/kl_k3": sum(x - 1 - math.log(x) for x in rho) / n,
        "mismatch/abs_logprob_diff_max": max(abs(a - b) for a, b in pairs),
        "mismatch/extreme_frac_2": sum(max(x, 1 / x) > 2 for x in rho) / n,
        "mismatch/is_weight_mean": sum(min(x, 1.5) for x in rho) / n,
        "mismatch/is_truncated_frac": sum(x > 1.5 for x in rho) / n,
    }
    old[mask == 0] = math.nan
    assert finish(mismatch_metrics(old, mu, mask, 1.5)) == pytest.approx(expected, rel=1e-6)
    halves = [mismatch_metrics(old[s], mu[s], mask[s], 1.5) for s in (slice(0, 13), slice(13, 50))]
    assert finish(merge(*halves)) == pytest.approx(expected, rel=1e-6)


def test_k3_resolves_float32_noise() -> None:
    """A difference of one float32 step has a k3 far below float32's own rounding of exp(x) - 1."""
    mu = torch.full((4,), -1.0)
    old = mu + torch.tensor([2**-23, -(2**-23), 0.0, 2**-20])
    exact = sum(d * d / 2 for d in (old - mu).double().tolist()) / 4
    assert finish(mismatch_metrics(old, mu, torch.ones(4), 5.0))["mismatch/kl_k3"] == pytest.approx(exact, rel=1e-5)


def test_staleness() -> None:
    values = finish(staleness_metrics(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])))
    assert values["staleness/ratio_max"] == pytest.approx(math.exp(0.5))
    assert values["staleness/kl_k3"] == pytest.approx((math.exp(0.5) - 1.5 + math.exp(-1.0)) / 2)


def test_nothing_to_average_is_nan_and_empty_slices_are_allowed() -> None:
    empty = torch.zeros(0)
    values = finish(merge(mismatch_metrics(empty, empty, empty, 5.0), staleness_metrics(empty, empty)))
    assert math.isnan(values["mismatch/kl_k3"]) and values["staleness/ratio_max"] == 0
