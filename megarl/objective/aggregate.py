"""What a sum over tokens is divided by. T: packed tokens, n: responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megarl.objective.presets import ObjectiveConfig


@dataclass(frozen=True)
class Segments:
    """index [m] int64: the number of each element's segment, from 0; count: distinct segments, empty ones included."""

    index: Tensor
    count: int

    def spread_sums(self, x: Tensor) -> Tensor:
        """Sums x [m] over each segment, spread back over its elements: [m]."""
        return x.new_zeros(self.count).index_add(0, self.index, x)[self.index]

    def spread(self, x: Tensor) -> Tensor:
        """One element of each segment (whichever), spread over all of them: [m]."""
        return x.new_zeros(self.count).scatter(0, self.index, x)[self.index]

    def sizes(self) -> Tensor:
        """How many elements the segment of each element has: int64 [m]."""
        return torch.bincount(self.index, minlength=self.count)[self.index]


def number(ids: Tensor) -> Segments:
    """Numbers arbitrary ids [m] from 0."""
    # Equal neighbours first: packed ids are a few long runs, and only those are sorted.
    runs, run = torch.unique_consecutive(ids, return_inverse=True)
    values, index = torch.unique(runs, return_inverse=True)
    return Segments(index[run], values.numel())


def count(ids: Tensor) -> Tensor:
    """How many distinct ids there are, negative ones (padding) left out: []. By sorting, which no host waits for."""
    ordered = ids.sort().values
    return (ordered[:1] >= 0).sum() + ((ordered[1:] != ordered[:-1]) & (ordered[1:] >= 0)).sum()


class Divisors(NamedTuple):
    """inner: [R] or a number, what stands inside a response (1, |y|, the maximum length, the tokens of the group).

    units: [], how many responses, tokens or groups the call holds. The loss is  sum_t term_t / inner_t / units.
    """

    inner: Tensor | float
    units: Tensor


def divisors(
    rows: Tensor, responses: Callable[[], Segments], seq_ids: Tensor, group_ids: Tensor | None, config: ObjectiveConfig
) -> Divisors:
    """What the loss of one call is divided by, over its R unmasked tokens.

    rows [R]: which of the T tokens those are; responses(): their responses, asked for only where sizes count.
    Responses without a single unmasked token count; padding does not.
    """
    if config.denominator == "tokens":
        return Divisors(1.0, rows.new_full((), len(rows)))
    if config.denominator == "group_tokens":
        if group_ids is None:
            raise ValueError("denominator group_tokens needs group_ids")
        return Divisors(number(group_ids[rows]).sizes(), count(torch.where(seq_ids >= 0, group_ids, -1)))
    inner: Tensor | float = 1.0
    if config.denominator == "response_tokens":
        inner = responses().sizes()
    elif config.denominator == "max_length":
        inner = float(config.max_length)
    return Divisors(inner, count(seq_ids))


def denominators(lengths: Tensor, group_ids: Tensor, config: ObjectiveConfig) -> Tensor:
    """The whole divisor of every response of a mini-batch [n], float64, from what all ranks
    know: response lengths [n] (unmasked tokens) and groups [n]. Spread over tokens, it is
    the `denominator` with which policy_loss may be split in any way, groups included.
    """
    exact = lengths.double()
    ones, count = torch.ones_like(exact), len(exact)
    if config.denominator == "tokens":
        return ones * exact.sum()
    if config.denominator == "group_tokens":
        group = number(group_ids)
        return group.spread_sums(exact).clamp(min=1) * group.count
    if config.denominator == "response_tokens":
        return exact.clamp(min=1) * count
    return ones * count * (config.max_length if config.denominator == "max_length" else 1)
