"""What a sum over tokens is divided by. T: packed tokens, n: responses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.objective.presets import ObjectiveConfig


@dataclass(frozen=True)
class Segments:
    """index [m] int64: the number of each element's segment, from 0; real [count] bool: not padding; count: distinct segments."""

    index: Tensor
    real: Tensor
    count: int

    def spread_sums(self, x: Tensor) -> Tensor:
        """Sums x [m] over each segment, spread back over its elements: [m]."""
        return x.new_zeros(self.count).index_add(0, self.index, x)[self.index]


def number(ids: Tensor) -> Segments:
    """Numbers arbitrary ids [m] from 0. Negative ids mark padding."""
    values, index = torch.unique(ids, return_inverse=True)
    return Segments(index, values >= 0, values.numel())


def divisors(mask: Tensor, seq: Segments, group_ids: Tensor | None, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """(inner [T], units []): the loss of one call is  sum_t term_t / inner_t / units.

    `inner` is what stands inside a response (1, |y|, the maximum length, the tokens of the group), `units` counts responses, tokens or
    groups of this call. Responses without a single unmasked token count; padding does not.
    """
    inner = torch.ones_like(mask)
    if config.denominator == "tokens":
        return inner, mask.sum()
    if config.denominator == "group_tokens":
        if group_ids is None:
            raise ValueError("denominator group_tokens needs group_ids")
        group = number(torch.where(seq.real[seq.index], group_ids, -1))
        return group.spread_sums(mask).clamp(min=1), group.real.sum()
    if config.denominator == "response_tokens":
        inner = seq.spread_sums(mask).clamp(min=1)
    elif config.denominator == "max_length":
        inner = inner * config.max_length
    return inner, seq.real.sum()


def denominators(lengths: Tensor, group_ids: Tensor, config: ObjectiveConfig) -> Tensor:
    """The whole divisor of every response of a mini-batch [n], float64, from what all ranks know: response lengths [n] (unmasked
    tokens) and groups [n]. Spread over tokens, it is the `denominator` with which policy_loss may be split in any way, groups included.
    """
    exact = lengths.double()
    one, count = torch.ones_like(exact), len(exact)
    if config.denominator == "tokens":
        return one * exact.sum()
    if config.denominator == "group_tokens":
        group = number(group_ids)
        return group.spread_sums(exact).clamp(min=1) * group.count
    if config.denominator == "response_tokens":
        return exact.clamp(min=1) * count
    return one * count * (config.max_length if config.denominator == "max_length" else 1)
