"""What a sum over tokens is divided by. T: packed tokens, n: responses."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.objective.presets import ObjectiveConfig


def number(ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """Numbers arbitrary ids [m] from 0: (index [m], bool [distinct] that are real, distinct). Negative ids mark padding."""
    values, index = torch.unique(ids, return_inverse=True)
    return index, values >= 0, values.numel()


def per_segment(x: Tensor, index: Tensor, segments: int) -> Tensor:
    """Sums x [T] over segments, spread back over their tokens: [T]."""
    return x.new_zeros(segments).index_add(0, index, x)[index]


def divisors(mask: Tensor, seq_ids: Tensor, group_ids: Tensor | None, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """(inner [T], units []): the loss of one call is  sum_t term_t / inner_t / units.

    `inner` is what stands inside a response (1, |y|, the maximum length, the tokens of the group), `units` counts responses, tokens or
    groups of this call. Responses without a single unmasked token count; negative seq_ids (padding) do not.
    """
    inner = torch.ones_like(mask)
    if config.denominator == "tokens":
        return inner, mask.sum()
    if config.denominator == "group_tokens":
        if group_ids is None:
            raise ValueError("denominator group_tokens needs group_ids")
        index, real, segments = number(torch.where(seq_ids >= 0, group_ids, -1))
        return per_segment(mask, index, segments).clamp(min=1), real.sum()
    index, real, segments = number(seq_ids)
    if config.denominator == "response_tokens":
        inner = per_segment(mask, index, segments).clamp(min=1)
    elif config.denominator == "max_length":
        inner = inner * config.max_length
    return inner, real.sum()


def denominators(lengths: Tensor, group_ids: Tensor, config: ObjectiveConfig) -> Tensor:
    """The whole divisor of every response of a mini-batch [n], float64, from what all ranks know: response lengths [n] (unmasked
    tokens) and groups [n]. Spread over tokens, it is the `denominator` with which policy_loss may be split in any way, groups included.
    """
    exact = lengths.double()
    one, count = torch.ones_like(exact), len(exact)
    if config.denominator == "tokens":
        return one * exact.sum()
    if config.denominator == "group_tokens":
        index, _, groups = number(group_ids)
        return per_segment(exact, index, groups).clamp(min=1) * groups
    if config.denominator == "response_tokens":
        return exact.clamp(min=1) * count
    return one * count * (config.max_length if config.denominator == "max_length" else 1)
