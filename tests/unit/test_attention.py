"""Packed attention against a softmax with an explicit mask: sequences
of very different lengths in one pack, forward and backward.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.engine import attention
from megarl.engine.attention import (
    SHORTEST,
    PackedCausalAttention,
    PackedSequences,
    groups_of_segments,
    packed_sequences,
)
from megarl.engine.batch import cp_spans

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


def lower_right(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edges: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float | None,
) -> torch.Tensor:
    """As flash attention says of its causal mask over segments with more keys than queries."""
    outs = []
    assert longest == tuple(int(part.diff().max()) for part in edges) and edges[1][-1] == len(key) == len(value)
    for (a, b), (c, d) in zip(*(pairwise(part.tolist()) for part in edges), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True))
    return torch.cat(outs, dim=1).transpose(0, 1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_flash_kernels_see_under_context_parallelism_what_the_mask_lets_see(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no mask of queries by keys is made for them."""
    lengths, heads, groups, dim = [24, 136, 8, 56], 4, 2, 8
    spans = cp_spans(sum(lengths), ranks)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2 * groups + heads, sum(map(len, own)), 1, dim, generator=generator) for own in spans]
    everyone = torch.cat([torch.cat(tuple(x[heads:].split(groups)), dim=-1) for x in rows], dim=1).permute(1, 2, 0, 3)
    monkeypatch.setattr(attention.parallel_state, "get_context_parallel_group", lambda: None)
    monkeypatch.setattr(attention, "gather_from_sequence_parallel_region", lambda *_, **__: everyone)
    for rank, own in enumerate(rows):
        query, key, value = (x.permute(1, 2, 0, 3) for x in own.split([heads, groups, groups]))
        packed = packed_sequences(lengths, spans, rank)
        layer = PackedCausalAttention(None, 1)
        want = layer(query, key, value, None, packed_seq_params=packed)
        flash = packed_sequences(lengths, spans, rank)
        with monkeypatch.context() as patched:
            patched.setattr(attention, "_flash", lambda _: lower_right)
            torch.testing.assert_close(layer(query, key, value, None, packed_seq_params=flash), want)
        assert not any("mask" in vars(rectangle) for rectangle in flash.rectangles)


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


ROWS, HEADS, WIDTH = 6, 2, 16


class OnGpu(Tensor):
    """Host memory that calls itself a GPU's."""

    is_cuda = True


def handed_to_varlen(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], value: Callable[[Tensor], Tensor]) -> Any:
    """The values that torch's kernel is given on a GPU; None where it is not asked. They are cut out of a tensor of
    `shape`; queries and keys are as wide as they are.
    """
    given: list[Tensor] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        given.append(value)
        return torch.empty_like(query)

    monkeypatch.setattr(attention, "varlen_attention", lambda: kernel)
    packed = packed_sequences([ROWS], [[range(ROWS)]], 0)
    cut = value(torch.zeros(ROWS, 1, *shape, dtype=torch.bfloat16).as_subclass(OnGpu))
    query = torch.zeros(cut.shape, dtype=torch.bfloat16).as_subclass(OnGpu)
    out = PackedCausalAttention(None, 1)(query, query, cut, None, packed_seq_params=packed)
    assert out.shape == (ROWS, 1, cut[0, 0].numel())
    return given[0] if given else None


def test_values_with_gaps_are_handed_to_the_kernel_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As megatron-core cuts them out of one product: the kernel wants no gaps in the last dimension, and no more."""
    value = handed_to_varlen(monkeypatch, (HEADS, 4 * WIDTH), lambda x: x[..., 3 * WIDTH :])
    assert value.stride() == (HEADS * 4 * WIDTH, 4 * WIDTH, 1) and value.storage_offset() == 3 * WIDTH


MISREAD: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "another order": ((WIDTH, HEADS), lambda x: x.transpose(2, 3)),
    "begins off 16 bytes": ((HEADS, 8 * WIDTH + 8), lambda x: x[..., 12 : 12 + WIDTH]),
    "heads off 16 bytes": ((HEADS, WIDTH + 1), lambda x: x[..., :WIDTH]),
}


@pytest.mark.parametrize("name", MISREAD)
def test_what_the_kernel_would_misread_is_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses the first, and does not look for the others."""
    value = handed_to_varlen(monkeypatch, *MISREAD[name])
    assert value.stride() == (HEADS * WIDTH, WIDTH, 1) and value.storage_offset() == 0


@pytest.mark.parametrize(("width", "taken"), [(12, False), (64, True), (192, True), (256, True), (264, False)])
def test_heads_of_widths_that_the_kernel_refuses_take_rectangles(
    width: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (handed_to_varlen(monkeypatch, (HEADS, width), lambda x: x) is not None) == taken
