"""Group advantages, GAE, and what dynamic sampling and long responses need, against loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from megarl.objective import advantages, gae, informative, overlong_penalty, presets

REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5, 0.25, 2.0, 0.3, 0.3, 0.3]
GROUPS = [7, 7, -2, 7, -2, 5, -2, 9, 9, 9]


def expected(kind: str) -> list[float]:
    """Straight from the papers, one response at a time."""
    found = []
    for i, (reward, group) in enumerate(zip(REWARDS, GROUPS)):
        peers = [r for r, g in zip(REWARDS, GROUPS) if g == group]
        others = [r for j, (r, g) in enumerate(zip(REWARDS, GROUPS)) if g == group and j != i]
        value = reward - statistics.fmean(peers)
        if kind == "mean_std":
            value /= (statistics.stdev(peers) if len(peers) > 1 else 0.0) + 1e-6
        if kind == "leave_one_out":
            value = reward - statistics.fmean(others) if others else 0.0
        found.append(value)
    if kind == "global_std":
        centre, spread = statistics.fmean(found), statistics.stdev(found)
        found = [(value - centre) / (spread + 1e-6) for value in found]
    return found


@pytest.mark.parametrize("name", [*presets, "leave_one_out", "global_std"])
def test_against_a_loop(name: str) -> None:
    config = presets[name] if name in presets else presets["minirl"].model_copy(update={"advantage": name})
    got = advantages(torch.tensor(REWARDS), torch.tensor(GROUPS), config)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(REWARDS if config.advantage == "gae" else expected(config.advantage), abs=1e-6)


@pytest.mark.parametrize("kind", ["mean", "mean_std", "leave_one_out", "global_std"])
def test_equal_rewards_give_zero_even_over_their_standard_deviation(kind: str) -> None:
    config = presets["minirl"].model_copy(update={"advantage": kind})
    got = advantages(torch.full((7,), 0.3), torch.zeros(7, dtype=torch.long), config)
    assert got.abs().max() < 1e-9


def test_raw_rewards() -> None:
    config = presets["reinforce"].model_copy(update={"advantage": "reward"})
    assert advantages(torch.tensor(REWARDS), torch.tensor(GROUPS), config).tolist() == pytest.approx(REWARDS)


def test_which_groups_can_teach() -> None:
    rewards, groups = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.1, 0.2, 5.0]), torch.tensor([3, 3, -1, -1, 8, 8, 4])
    assert informative(rewards, groups, presets["minirl"]).tolist() == [False, False, False, False, True, True, False]
    raw = presets["reinforce"].model_copy(update={"advantage": "reward"})
    assert informative(rewards, groups, raw).tolist() == [False, False, True, True, True, True, True]
    assert informative(rewards, groups, presets["ppo"]).all()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_gae_is_the_sum_of_its_definition(gamma: float, lam: float) -> None:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, in packed rows with
    prompts and padding between the responses, which hold anything.
    """
    lengths, rewards = [3, 1, 5, 0, 2], [1.0, -0.5, 2.0, 9.0, 0.0]
    generator = torch.Generator().manual_seed(0)
    size = sum(lengths) + 2 * len(lengths) + 3
    values = torch.full((size,), math.nan, dtype=torch.float64)
    paid, mask, seq_ids = values.clone(), torch.zeros(size), torch.full((size,), -1)
    expected, places, at = [], [], 0
    for i, (length, reward) in enumerate(zip(lengths, rewards)):
        seq_ids[at : at + 2 + length] = 10 - i
        rows = list(range(at + 2, at + 2 + length))
        v = torch.randn(length, generator=generator, dtype=torch.float64).tolist()
        values[rows], paid[rows], mask[rows] = torch.tensor(v, dtype=torch.float64), reward, 1.0
        deltas = [(reward if t == length - 1 else gamma * v[t + 1]) - v[t] for t in range(length)]
        expected += [sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]
        places += rows
        at += 2 + length
    found, returns = gae(paid, values, mask, seq_ids, gamma=gamma, lam=lam)
    assert found[places].tolist() == pytest.approx(expected, rel=1e-12)
    assert (returns - found - values)[places].abs().max() < 1e-12
    rest = torch.ones(size, dtype=torch.bool)
    rest[places] = False
    assert (found[rest] == 0).all() and (returns[rest] == 0).all()
    if (gamma, lam) == (1.0, 1.0):  # Monte Carlo: the return is the reward itself
        assert returns[places].tolist() == pytest.approx([r for r, n in zip(rewards, lengths) for _ in range(n)])


def test_overlong_penalty_is_a_ramp() -> None:
    lengths = torch.tensor([1, 12, 13, 14, 16, 20])
    assert overlong_penalty(lengths, longest=16, buffer=4, factor=0.5).tolist() == [0, 0, -0.125, -0.25, -0.5, -0.5]
    assert overlong_penalty(lengths, longest=16, buffer=0, factor=0.5).tolist() == [0] * 6
