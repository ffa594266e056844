"""Packed attention against a softmax with an explicit mask: sequences
of very different lengths in one pack, forward and backward.
"""

from __future__ import annotations

import random

import pytest
import torch

from megarl.engine.attention import (
    SHORTEST,
    PackedCausalAttention,
    PackedSequences,
    groups_of_segments,
    packed_sequences,
)

LENGTHS = [3, 300, 1, 280, 40, 150, 41, 39, 2, 149]


@pytest.mark.parametrize("lengths", [LENGTHS, [7] * 5, [1]])
def test_a_pack_attends_as_each_sequence_alone(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, heads, groups, dim = sum(lengths), 4, 2, 8
    query, key, value = (
        torch.randn(rows, 1, n, dim, generator=generator, requires_grad=True) for n in (heads, groups, groups)
    )
    upstream = torch.randn(rows, 1, heads * dim, generator=generator)
    packed = packed_sequences(lengths, [[range(rows)]], 0)
    assert len(packed.rectangles) == (1 if len(set(lengths)) == 1 else 3)
    out = PackedCausalAttention(None, 1)(query, key, value, None, packed_seq_params=packed)
    got = torch.autograd.grad(out, (query, key, value), upstream)

    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (sequence[:, None] == sequence) & torch.ones(rows, rows, dtype=torch.bool).tril()
    wide = [x.squeeze(1).repeat_interleave(heads // x.shape[2], dim=1).transpose(0, 1) for x in (query, key, value)]
    scores = (wide[0] @ wide[1].transpose(1, 2) / dim**0.5).masked_fill(~seen, float("-inf"))
    want = (scores.softmax(-1) @ wide[2]).transpose(0, 1).flatten(1).unsqueeze(1)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, torch.autograd.grad(want, (query, key, value), upstream)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def gradients(packed: PackedSequences, rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(rows, 1, 2, 4, 8, generator=generator, requires_grad=True)  # two groups: 2 queries, key, value
    query, key, value = fused[..., :2, :].flatten(2, 3), fused[..., 2, :], fused[..., 3, :]
    out = PackedCausalAttention(None, 1)(query, key, value, None, packed_seq_params=packed)
    return [out, *torch.autograd.grad(out, [fused], torch.randn(out.shape, generator=generator))]


def test_segments_of_one_length_are_not_moved() -> None:
    """And the gradients are those of the index, to the bit."""
    rows = 5 * 70
    packed = packed_sequences([70] * 5, [[range(rows)]], 0)
    assert packed.cells is None
    got = gradients(packed, rows)
    packed.cells = torch.arange(rows)
    for one, other in zip(got, gradients(packed, rows), strict=True):
        assert torch.equal(one, other)


def test_rectangles_hold_every_segment_once_and_pad_little() -> None:
    rng = random.Random(0)
    lengths = [min(32_768, max(2, int(1500 * rng.lognormvariate(0, 1.0)))) for _ in range(500)]
    groups = groups_of_segments(lengths)
    assert sorted(i for group in groups for i in group) == list(range(500))
    cells = sum(len(group) * lengths[group[0]] for group in groups)
    assert 1 - sum(lengths) / cells < 1 - SHORTEST


def test_short_segments_share_a_rectangle_where_a_call_costs_more_than_their_padding() -> None:
    assert len(groups_of_segments([24, 9, 17, 12])) == 1
