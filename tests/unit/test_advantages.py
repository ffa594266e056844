"""Group advantages against a loop."""

from __future__ import annotations

import statistics

import pytest
import torch

from megarl.errors import UserError
from megarl.objective import advantages, presets

REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5, 0.25, 2.0, 0.3, 0.3, 0.3]
GROUPS = [7, 7, -2, 7, -2, 5, -2, 9, 9, 9]


@pytest.mark.parametrize("name", ["minirl", "grpo", "dr-grpo", "cispo"])
def test_against_a_loop(name: str) -> None:
    expected = []
    for reward, group in zip(REWARDS, GROUPS):
        peers = [r for r, g in zip(REWARDS, GROUPS) if g == group]
        value = reward - statistics.fmean(peers)
        if name in ("grpo", "cispo"):
            value /= (statistics.stdev(peers) if len(peers) > 1 else 0.0) + 1e-6
        expected.append(value)
    got = advantages(torch.tensor(REWARDS), torch.tensor(GROUPS), presets[name])
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_equal_rewards_give_zero_even_over_their_standard_deviation() -> None:
    got = advantages(torch.full((7,), 0.3), torch.zeros(7, dtype=torch.long), presets["grpo"])
    assert got.abs().max() < 1e-9


def test_raw_rewards_and_gae() -> None:
    config = presets["reinforce"].model_copy(update={"advantage": "reward"})
    assert advantages(torch.tensor(REWARDS), torch.tensor(GROUPS), config).tolist() == pytest.approx(REWARDS)
    with pytest.raises(UserError, match="critic"):
        advantages(torch.tensor(REWARDS), torch.tensor(GROUPS), presets["ppo"])
