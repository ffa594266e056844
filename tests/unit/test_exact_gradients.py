"""The facts of docs/objective.md where every expectation is exact: all 27 sequences of
a vocabulary of 3 and length 3, a logit of its own for every prefix. An expectation over
mu is a sum over the sequences with their probabilities, folded into the advantage.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megarl.objective import ObjectiveConfig, policy_loss, presets

SEQUENCES = list(itertools.product(range(3), repeat=3))
ROW = {prefix: i for i, prefix in enumerate(p for n in range(3) for p in itertools.product(range(3), repeat=n))}
ROWS = torch.tensor([ROW[y[:t]] for y in SEQUENCES for t in range(3)])
TOKENS = torch.tensor([y[t] for y in SEQUENCES for t in range(3)])
GENERATOR = torch.Generator().manual_seed(0)
THETA, DIRECTION = torch.randn(2, len(ROW), 3, generator=GENERATOR, dtype=torch.float64)
REWARD = torch.randn(27, generator=GENERATOR, dtype=torch.float64)


def log_prob(logits: Tensor) -> Tensor:
    """log pi of every token of every sequence [81]."""
    return logits.log_softmax(-1)[ROWS, TOKENS]


def of_sequences(logprobs: Tensor) -> Tensor:
    """Probability of every sequence [27]."""
    return logprobs.view(27, 3).sum(1).exp()


def exact_gradient(theta: Tensor, reward: Tensor = REWARD) -> Tensor:
    """grad J_seq = grad E_{y ~ pi_theta} R(y), which is also grad E_mu [pi_theta(y)/mu(y) R(y)] for any mu."""
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad((of_sequences(log_prob(theta)) * reward).sum(), theta)[0]


def ascent(theta: Tensor, old: Tensor, mu: Tensor, config: ObjectiveConfig, reward: Tensor = REWARD) -> Tensor:
    """The direction in which policy_loss moves theta, in expectation over mu."""
    theta = theta.detach().requires_grad_()
    share = 27 * of_sequences(log_prob(mu)) * reward
    loss, _ = policy_loss(
        log_prob(theta),
        log_prob(old),
        log_prob(mu),
        share.repeat_interleave(3),
        torch.ones(81),
        torch.arange(27).repeat_interleave(3),
        config,
    )
    return torch.autograd.grad(-loss, theta)[0]


def slope(sizes: list[float], errors: list[float]) -> float:
    """Of log error over log size: the order of the error."""
    x, y = torch.tensor(sizes).log(), torch.tensor(errors).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize("name", ["minirl", "minirl-no-clip"])
@pytest.mark.parametrize("kind", ["mismatch", "staleness"])
def test_the_token_surrogate_is_first_order_in_the_distance_and_exact_at_zero(name: str, kind: str) -> None:
    """[Q] section 2: what separates grad J_token from grad J_seq is
    either factor of pi_theta/mu = pi_old/mu x pi_theta/pi_old.
    """
    exact = exact_gradient(THETA)

    def error(size: float) -> float:
        mu = THETA + size * DIRECTION
        found = ascent(THETA, THETA if kind == "mismatch" else mu, mu, presets[name])
        return float((found - exact).norm() / exact.norm())

    sizes = [3e-2, 1e-2, 3e-3, 1e-3, 1e-4]
    errors = [error(size) for size in sizes]
    assert abs(slope(sizes, errors) - 1) < 0.05, errors
    assert error(0.0) < 1e-14


def test_without_the_weight_the_error_does_not_come_from_the_tokens_alone() -> None:
    """A control: dropping mu leaves a first-order error too, but a
    larger one here; the whole weight of the sequence leaves none.
    """
    mu = THETA + 1e-2 * DIRECTION
    exact = exact_gradient(THETA)
    error = {
        name: float((ascent(THETA, THETA, mu, presets[name]) - exact).norm()) for name in ("minirl", "minirl-no-is")
    }
    assert error["minirl"] < 0.8 * error["minirl-no-is"]
    whole = ObjectiveConfig(weight="one", clip="none", correction="sequence_truncation", correction_high=1e9)
    assert (ascent(THETA, THETA, mu, whole) - exact).norm() / exact.norm() < 1e-14


def test_minirl_is_decoupled_ppo_clip_without_length_or_std_normalisation() -> None:
    old, mu = THETA + 0.15 * DIRECTION, THETA + 0.2 * DIRECTION.flip(0)
    theta = THETA.clone().requires_grad_()
    logp, logp_old, logp_mu = log_prob(theta), log_prob(old), log_prob(mu)
    assert (logp - logp_mu).exp().max() < 5
    share = (of_sequences(logp_mu) * REWARD).repeat_interleave(3)
    r = (logp - logp_old).exp()
    clipped = r.clamp(0.8, 1.27)
    assert (r != clipped).any()  # some tokens are outside
    behaviour = (logp_old - logp_mu).exp()
    expected = torch.autograd.grad((behaviour * torch.minimum(r * share, clipped * share)).sum(), theta)[0]
    torch.testing.assert_close(ascent(THETA, old, mu, presets["minirl"]), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["reinforce", "minirl", "minirl-no-is", "minirl-no-clip"])
def test_on_policy_it_is_reinforce_and_a_baseline_changes_nothing(name: str) -> None:
    exact = exact_gradient(THETA)
    baseline = REWARD - (of_sequences(log_prob(THETA)) * REWARD).sum()
    for reward in (REWARD, baseline):
        torch.testing.assert_close(ascent(THETA, THETA, THETA, presets[name], reward), exact, rtol=1e-12, atol=1e-15)


def test_length_normalisation_only_scales_where_all_lengths_are_equal() -> None:
    found = ascent(THETA, THETA, THETA, presets["minirl-length-norm"])
    torch.testing.assert_close(found, exact_gradient(THETA) / 3, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", list(presets))
def test_every_preset_follows_the_exact_gradient_on_policy(name: str) -> None:
    """At pi_theta = pi_old = mu every surrogate of the table is the policy gradient, up to its denominator."""
    config = presets[name]
    theta = THETA.clone().requires_grad_()
    same = log_prob(theta).detach()
    share = (27 * of_sequences(same) * REWARD).repeat_interleave(3)
    ids = torch.arange(27).repeat_interleave(3)
    loss, _ = policy_loss(
        log_prob(theta), same, same, share, torch.ones(81), ids, config, group_ids=torch.zeros(81).long()
    )
    scale = {"responses": 1, "max_length": config.max_length}.get(config.denominator, 3)
    torch.testing.assert_close(
        -torch.autograd.grad(loss, theta)[0] * scale, exact_gradient(THETA), rtol=1e-12, atol=1e-15
    )
