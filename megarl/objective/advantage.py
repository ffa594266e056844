"""From rewards to advantages: one a response, or by GAE one a token."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.objective.aggregate import Segments, number
from megarl.objective.choices import find
from megarl.objective.presets import ObjectiveConfig

STD_EPS = 1e-6


def advantages(rewards: Tensor, group_ids: Tensor, config: ObjectiveConfig) -> Tensor:
    """A(x, y) [n] from rewards [n] and the group (prompt) of each response [n], by `config.advantage`.

    A group of one has A = 0 unless A is the reward itself. Computed in float64, so that a group of equal rewards has
    A = 0 to rounding. Groups must be whole; under `global_std` the call must hold the whole batch.
    """
    return find("advantage", config.advantage)(rewards.double(), number(group_ids), config).to(rewards.dtype)


def reward(rewards: Tensor, groups: Segments, config: ObjectiveConfig) -> Tensor:
    """A = R. Under the choice `gae` the critic then spreads it over the tokens, see `gae`."""
    return rewards.clone()


def mean(rewards: Tensor, groups: Segments, config: ObjectiveConfig) -> Tensor:
    """A = R - mean over the group: MiniRL, arXiv 2512.01374 section 4.2."""
    return rewards - groups.spread_sums(rewards) / groups.sizes()


def mean_std(rewards: Tensor, groups: Segments, config: ObjectiveConfig) -> Tensor:
    """That over (std + 1e-6): GRPO, with the sample standard deviation (n - 1), as public codes take it."""
    centred = mean(rewards, groups, config)
    std = (groups.spread_sums(centred.square()) / (groups.sizes() - 1).clamp(min=1)).sqrt()
    return centred / (std + STD_EPS)


def leave_one_out(rewards: Tensor, groups: Segments, config: ObjectiveConfig) -> Tensor:
    """A = R - mean over the others of the group = n/(n - 1) (R - mean): RLOO, arXiv 2402.14740 section 3.3."""
    size = groups.sizes().to(rewards)
    return mean(rewards, groups, config) * size / (size - 1).clamp(min=1)


def global_std(rewards: Tensor, groups: Segments, config: ObjectiveConfig) -> Tensor:
    """R - mean over the group, over (std + 1e-6) of that over all n: REINFORCE++ baseline, arXiv 2501.03262 sec 3.2."""
    centred = mean(rewards, groups, config)  # its mean over all n is 0 already
    return centred / ((centred.square().sum() / max(len(centred) - 1, 1)).sqrt() + STD_EPS)


def informative(rewards: Tensor, group_ids: Tensor, config: ObjectiveConfig) -> Tensor:
    """bool [n]: whether the response's group can move the policy by its advantages (DAPO's dynamic sampling, arXiv
    2503.14476 eq 11).

    A group of equal rewards cannot, nor, under `reward`, one whose rewards are all 0. Under `gae` the critic decides,
    so every group can. An advantage from outside is taken to have a baseline, like `mean`.
    """
    if config.advantage == "gae":
        return torch.ones_like(rewards, dtype=torch.bool)
    group = number(group_ids)
    away = rewards != 0 if config.advantage == "reward" else rewards != group.spread(rewards)
    return group.spread_sums(away.double()) > 0


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, seq_ids: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(A_t, A_t + V_t), both [T], 0 where masked: generalised advantage estimation, arXiv 1506.02438 eq 11-16.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1}

    over the unmasked tokens of each response, in order; behind the last one V = A = 0.
    values[t] is the value before the token at t is chosen. rewards [T]: the reward of the
    response, on each of its tokens; it is paid with its last one. Elsewhere anything may stand.
    """
    places = mask.bool().nonzero().flatten()
    order = places[
        torch.argsort(seq_ids[places], stable=True)
    ]  # responses one after the other, whatever lies between their tokens
    seq, v, r = seq_ids[order].tolist(), values[order].double().tolist(), rewards[order].double().tolist()
    advantage, advantages = 0.0, [0.0] * len(order)
    for t in reversed(range(len(order))):
        last = t + 1 == len(order) or seq[t + 1] != seq[t]
        later_value, later = (0.0, 0.0) if last else (v[t + 1], advantage)
        advantage = (r[t] if last else 0.0) + gamma * later_value - v[t] + gamma * lam * later
        advantages[t] = advantage
    out = torch.zeros_like(values)
    out[order] = torch.tensor(advantages, dtype=torch.float64, device=values.device).to(values.dtype)
    return out, torch.where(mask.bool(), out + values, 0.0)


def overlong_penalty(lengths: Tensor, longest: int, buffer: int, factor: float) -> Tensor:
    """What DAPO takes off the reward of long responses [n], <= 0: arXiv 2503.14476 eq 13, times `factor`.

    0 up to longest - buffer tokens, then a straight line down to -factor at `longest`. A buffer of 0 turns it off.
    """
    over = (lengths.double() - (longest - buffer)).clamp(min=0, max=buffer)
    return -factor * over / max(buffer, 1)
