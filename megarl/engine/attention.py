"""Core attention over packed sequences for layer specs without Transformer Engine: torch's
scaled_dot_product_attention.

The rows of a pack are cut into segments, each of one sequence; segments of about equal length are
right-padded into a rectangle, attended causally, and what the padding computes is dropped. So there is
no mask of [tokens, tokens] and nothing attends across a border. Without context parallelism a segment
is a sequence and the flash kernels of torch apply. With it a rank has the queries of its own rows, gathers
keys and values of the whole pack, and attends with a mask of its segments.
On a GPU in half precision torch's varlen_attn takes the pack without rectangles and masks: each segment
against the rows of its sequence up to its own last one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megarl.engine.device import to_device

Varlen = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], tuple[int, int], float | None], Tensor]

# A segment shorter than SHORTEST of its rectangle's longest starts a rectangle of its own, unless all that this saves
# is fewer pairs of
# query and key than CALL_CELLS: about the cost of one more call.
SHORTEST = 0.9
CALL_CELLS = 2**14
# What torch's varlen kernels take (mha_varlen_fwd in its flash_api.cpp): heads of these widths, and numbers that they
# read so many bytes at a time, which they do not check.
VARLEN_WIDTHS = range(8, 257, 8)
VARLEN_BYTES = 16


@dataclass
class Rectangle:
    """Segments of about equal length. Padding points to row 0."""

    query_index: Tensor  # [segments, longest query] -> row of this rank
    key_index: Tensor  # [segments, longest key] -> row of the pack
    positions: Tensor | None = None  # [segments, longest query]: in their sequences; None where keys are the queries

    def to(self, device: torch.device) -> Rectangle:
        parts = (self.query_index, self.key_index, self.positions)
        return Rectangle(*(None if x is None else to_device(x, device) for x in parts))  # type: ignore[arg-type]

    @cached_property
    def mask(self) -> Tensor | None:
        """bool [segments, 1, longest query, longest key]; None is causal. What padding sees is dropped."""
        if self.positions is None:
            return None
        columns = torch.arange(self.key_index.shape[1], device=self.positions.device)
        return (columns <= self.positions[:, :, None])[:, None]


@dataclass
class Prefixes:
    """For each segment of this rank's rows the rows of its sequence up to its last one, one prefix after the other."""

    gathered: Tensor  # [sum of prefixes] -> place in the concatenation of all context-parallel ranks' rows
    query_edges: Tensor  # int32 [segments + 1]
    key_edges: Tensor
    longest_query: int
    longest_key: int

    def to(self, device: torch.device) -> Prefixes:
        gathered, query_edges, key_edges = (
            to_device(x, device) for x in (self.gathered, self.query_edges, self.key_edges)
        )
        return Prefixes(gathered, query_edges, key_edges, self.longest_query, self.longest_key)


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packed parameters, and where each row lies in the padded rectangles."""

    rectangles: list[Rectangle] = field(default_factory=list)
    # [rows of this rank] -> cell of the query rectangles, one after the other; None where the rows are the cells
    cells: Tensor | None = None
    positions: Tensor | None = None  # int64 [rows of this rank]: of each row in its sequence
    gathered: Tensor | None = None  # row of the pack -> place in the concatenation of all context-parallel ranks' rows
    prefixes: Prefixes | None = None  # under context parallelism

    def to(self, device: torch.device) -> PackedSequences:
        moved: dict[str, Any] = {
            f.name: to_device(value, device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(
            self,
            rectangles=[rectangle.to(device) for rectangle in self.rectangles],
            prefixes=self.prefixes and self.prefixes.to(device),
            **moved,
        )


def packed_sequences(lengths: list[int], cp_spans: list[list[range]], cp_rank: int) -> PackedSequences:
    """lengths: of the pack's sequences, padding included; cp_spans: the
    spans of rows of each context-parallel rank, in their order.
    """
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    cu_seqlens = torch.tensor(edges, dtype=torch.int32)
    packed = PackedSequences(
        qkv_format="sbhd",  # rows with a batch of one: Megatron then leaves rotation and attention to the modules below
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    # (first row, end row) of each segment in the pack, and the first row of its sequence
    segments = [
        (max(a, span.start), min(b, span.stop), a)
        for span in cp_spans[cp_rank]
        for a, b in pairwise(edges)
        if max(a, span.start) < min(b, span.stop)
    ]
    first, end, start = torch.tensor(segments).unbind(1)
    queries, keys = end - first, end - start
    packed.positions = ramps(first - start, queries)
    place = queries.cumsum(0) - queries  # first row of each segment among this rank's rows
    packed.cells = torch.empty(int(queries.sum()), dtype=torch.long)
    cells = 0
    for group in groups_of_segments(keys.tolist()):
        query_index, inside = _rectangle(place[group], queries[group])
        rectangle = Rectangle(query_index, query_index)
        if len(cp_spans) > 1:
            rectangle.key_index, _ = _rectangle(start[group], keys[group])
            rectangle.positions = (first - start)[group][:, None] + torch.arange(query_index.shape[1])
        packed.rectangles.append(rectangle)
        packed.cells[query_index[inside]] = cells + inside.flatten().nonzero().flatten()
        cells += inside.numel()
    if len(cp_spans) == 1 and len(set(lengths)) == 1:
        packed.cells = None
    if len(cp_spans) > 1:
        rows = torch.cat([torch.arange(span.start, span.stop) for spans in cp_spans for span in spans])
        packed.gathered = rows.argsort()
        packed.prefixes = Prefixes(
            packed.gathered[ramps(start, keys)], _edges(queries), _edges(keys), int(queries.max()), int(keys.max())
        )
    return packed


def _edges(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def ramps(starts: Tensor, lengths: Tensor) -> Tensor:
    """int64 [sum of lengths]: start, start + 1, ... of each length, one after the other."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)


def groups_of_segments(lengths: list[int]) -> list[list[int]]:
    """Numbers of the segments of each rectangle, longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    longest = 0
    for number, i in enumerate(order):
        saved = (len(order) - number) * (longest**2 - lengths[i] ** 2)
        if not groups or (lengths[i] < SHORTEST * longest and saved > CALL_CELLS):
            groups.append([])
            longest = lengths[i]
        groups[-1].append(i)
    return groups


def _rectangle(starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """[segments, longest]: the row of each cell, 0 in padding, and which cells are inside a segment."""
    column = torch.arange(int(sizes.max()))
    inside = column < sizes[:, None]
    return torch.where(inside, starts[:, None] + column, 0), inside


class RowRotary(torch.nn.Module):
    """Rotary angles of the rows of a pack by their positions, [T, 1, 1, dim], in place of those of one long sequence.

    Stands in a GPTModel's `rotary_pos_emb`, which asks for the length just before it asks for the angles.
    """

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary: Any = rotary
        self.positions: Tensor | None = None

    def get_rotary_seq_len(self, context: Any, decoder: Any, rows: Any, config: Any, packed: PackedSequences) -> int:
        self.positions = packed.positions
        return self.rotary.get_rotary_seq_len(context, decoder, rows, config, packed)

    def forward(self, max_seq_len: int, **kwargs: Any) -> Tensor:
        return self.rotary.get_emb(max_seq_len)[self.positions]


class PackedCausalAttention(torch.nn.Module):
    """Fits the core_attention place of megatron-core's SelfAttention.
    q, k, v are [T, 1, heads, dim]; returns [T, 1, heads * dim of v].

    Values may be narrower than queries and keys (MLA): they are then padded, since torch's flash kernels want one width
    and its other kernel keeps the whole score matrix.
    """

    def __init__(
        self, config: Any, layer_number: int, *args: Any, softmax_scale: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSequences,
        **kwargs: Any,
    ) -> Tensor:
        packed, width, prefixes = packed_seq_params, value.shape[-1], packed_seq_params.prefixes
        varlen = _flash(query)
        if packed.gathered is not None:
            group = parallel_state.get_context_parallel_group()
            both = torch.cat([key, value], dim=-1)
            # forward all-gather, backward reduce-scatter: each rank's queries attend to all keys, so gradients add up
            both = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=group)
            both = both.index_select(0, packed.gathered if varlen is None or prefixes is None else prefixes.gathered)
            key, value = both.split([key.shape[-1], width], dim=-1)
        if width < query.shape[-1]:  # padding by nothing would copy too
            value = F.pad(value, (0, query.shape[-1] - width))

        if varlen is not None:
            edges, longest = (packed.cu_seqlens_q,) * 2, (packed.max_seqlen_q,) * 2
            if prefixes is not None:
                edges = prefixes.query_edges, prefixes.key_edges
                longest = prefixes.longest_query, prefixes.longest_key
            q, k, v = (readable(x[:, 0]) for x in (query, key, value))
            out = varlen(q, k, v, edges, longest, self.scale)
            return out[..., :width].flatten(1).unsqueeze(1)

        def rectangle(x: Tensor, index: Tensor) -> Tensor:  # [T, 1, heads, dim] -> [segments, heads, longest, dim]
            # index_select of what lies in one piece costs less, the copy included
            cells = x if packed.cells is None else x.contiguous().index_select(0, index.flatten())
            return cells.view(*index.shape, *x.shape[2:]).transpose(1, 2)

        outs = []
        for part in packed.rectangles:
            out = F.scaled_dot_product_attention(
                rectangle(query, part.query_index),
                rectangle(key, part.key_index),
                rectangle(value, part.key_index),
                attn_mask=part.mask,
                is_causal=part.mask is None,
                scale=self.scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
            outs.append(out[..., :width].transpose(1, 2).flatten(0, 1))
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        if packed.cells is not None:
            out = out.index_select(0, packed.cells)
        return out.flatten(1).unsqueeze(1)


def _flash(query: Tensor) -> Varlen | None:
    """Where its kernels take heads of this width."""
    fits = query.is_cuda and query.dtype != torch.float32 and query.shape[-1] in VARLEN_WIDTHS
    return varlen_attention() if fits else None


def readable(x: Tensor) -> Tensor:
    """[T, heads, dim] as torch's varlen kernels read it. Values cut out of the product for queries, keys and values are
    so, gaps and all; what is not is copied.
    """
    steps = (*x.stride()[:-1], x.storage_offset())
    aligned = x.stride(-1) == 1 and all(step * x.element_size() % VARLEN_BYTES == 0 for step in steps)
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


@cache
def varlen_attention() -> Varlen | None:
    """torch's causal attention over a pack: (q [T, heads, dim], k, v, edges of the segments of queries and of those of
    keys, the longest of each, scale) -> [T, heads, dim]; None if it has none.

    Where a segment has more keys than queries, its last query sees its last key (flash attention's mask since 2.1).
    The flash kernels take fewer key heads than query heads; from torch 2.12 on varlen_attn wants to be told so
    (`enable_gqa`). Where it may be told not to split the keys (`num_splits`), deterministic mode does: the result of a
    sequence then does not depend on its pack.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        edges: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        scale: float | None,
    ) -> Tensor:
        more: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in known else {}
        if "num_splits" in known and torch.are_deterministic_algorithms_enabled():
            more["num_splits"] = 1
        out: Any = varlen_attn(query, key, value, *edges, *longest, scale=scale, window_size=(-1, 0), **more)
        return out

    return attend
