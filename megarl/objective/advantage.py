"""From rewards to advantages: one a response, or by GAE one a token."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.objective.aggregate import number
from megarl.objective.presets import ObjectiveConfig

STD_EPS = 1e-6


def advantages(rewards: Tensor, group_ids: Tensor, config: ObjectiveConfig) -> Tensor:
    """A(x, y) [n] from rewards [n] and the group (prompt) of each response [n], by `config.advantage`.

    mean            R - mean over the group (MiniRL, arXiv 2512.01374 section 4.2)
    mean_std        that over (std + 1e-6), the sample standard deviation (n - 1) as public GRPO codes take it
    leave_one_out   R - mean over the others of the group = n/(n - 1) (R - mean)  RLOO, arXiv 2402.14740 section 3.3
    global_std      R - mean over the group, then that over its (std + 1e-6) over all n  REINFORCE++ baseline, arXiv
                    2501.03262 section 3.2
    reward, gae     R; with `gae` the critic spreads it over the tokens (see `gae`)

    A group of one has A = 0 under the first four. Computed in float64, so that a group of equal rewards has A = 0 to
    rounding. Groups must be whole; under `global_std` the call must hold the whole batch.
    """
    if config.advantage in ("reward", "gae"):
        return rewards.clone()
    group, exact = number(group_ids), rewards.double()
    size = group.spread_sums(torch.ones_like(exact))
    centred = exact - group.spread_sums(exact) / size
    if config.advantage == "mean_std":
        std = (group.spread_sums(centred.square()) / (size - 1).clamp(min=1)).sqrt()
        centred = centred / (std + STD_EPS)
    elif config.advantage == "leave_one_out":
        centred = centred * size / (size - 1).clamp(min=1)
    elif config.advantage == "global_std":
        centred = centred / (
            (centred.square().sum() / max(len(centred) - 1, 1)).sqrt() + STD_EPS
        )  # its mean is 0 already
    return centred.to(rewards.dtype)


def informative(rewards: Tensor, group_ids: Tensor, config: ObjectiveConfig) -> Tensor:
    """bool [n]: whether the response's group can move the policy through its advantages (DAPO's dynamic sampling, arXiv
    2503.14476 eq 11).

    A group of equal rewards cannot, nor, under `reward`, one whose
    rewards are all 0; under `gae` the critic decides, so every group can.
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
    advantage, found = 0.0, [0.0] * len(order)
    for t in reversed(range(len(order))):
        last = t + 1 == len(order) or seq[t + 1] != seq[t]
        later_value, later = (0.0, 0.0) if last else (v[t + 1], advantage)
        advantage = (r[t] if last else 0.0) + gamma * later_value - v[t] + gamma * lam * later
        found[t] = advantage
    out = torch.zeros_like(values)
    out[order] = torch.tensor(found, dtype=torch.float64, device=values.device).to(values.dtype)
    return out, torch.where(mask.bool(), out + values, 0.0)


def overlong_penalty(lengths: Tensor, longest: int, buffer: int, factor: float) -> Tensor:
    """What DAPO takes off the reward of long responses [n], <= 0: arXiv 2503.14476 eq 13, times `factor`.

    0 up to longest - buffer tokens, then a straight line down to -factor at `longest`. A buffer of 0 turns it off.
    """
    over = (lengths.double() - (longest - buffer)).clamp(min=0, max=buffer)
    return -factor * over / max(buffer, 1)
