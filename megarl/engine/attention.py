"""Core attention over packed sequences for layer specs without Transformer Engine: torch's scaled_dot_product_attention.

The rows of a pack are cut into segments, each of one sequence; segments are right-padded into a rectangle, attended causally, and what
the padding computes is dropped. So there is no mask of [tokens, tokens] and nothing attends across a border. Without context
parallelism a segment is a sequence and the flash kernels of torch apply. With it a rank has the queries of its own rows, gathers keys and
values of the whole pack, and attends with a mask of its segments.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packed parameters, and where each row lies in the padded rectangles [segments, longest]."""

    query_index: Tensor | None = None  # [segments, longest query] -> row of this rank; padding points to row 0
    key_index: Tensor | None = None  # [segments, longest key] -> row of the pack
    cells: Tensor | None = None  # [rows of this rank] -> cell of the query rectangle
    mask: Tensor | None = None  # bool [segments, 1, longest query, longest key]; None is causal
    positions: Tensor | None = None  # int64 [rows of this rank]: of each row in its sequence
    gathered: Tensor | None = None  # row of the pack -> place in the concatenation of all context-parallel ranks' rows

    def to(self, device: torch.device) -> PackedSequences:
        moved = {f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **moved)


def packed_sequences(lengths: list[int], cp_spans: list[list[range]], cp_rank: int) -> PackedSequences:
    """lengths: of the pack's sequences, padding included; cp_spans: the spans of rows of each context-parallel rank, in their order."""
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
        for a, b in zip(edges, edges[1:])
        if max(a, span.start) < min(b, span.stop)
    ]
    packed.query_index, packed.cells = _rectangle([end - first for first, end, _ in segments])
    packed.positions = torch.cat([torch.arange(first - start, end - start) for first, end, start in segments])
    if len(cp_spans) == 1:
        packed.key_index = packed.query_index
        return packed
    sizes = torch.tensor([end - start for _, end, start in segments])
    column = torch.arange(int(sizes.max()))
    starts = torch.tensor([start for _, _, start in segments])
    packed.key_index = torch.where(column < sizes[:, None], starts[:, None] + column, 0)
    position = torch.tensor([first - start for first, _, start in segments])[:, None] + torch.arange(packed.query_index.shape[1])
    packed.mask = (column <= position[:, :, None])[:, None]  # padding queries see more than they should, and are dropped
    rows = torch.cat([torch.arange(span.start, span.stop) for spans in cp_spans for span in spans])
    packed.gathered = rows.argsort()
    return packed


def _rectangle(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """(row of each cell [segments, longest], cell of each row) for segments that follow each other."""
    lengths = torch.tensor(sizes)
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    index = torch.zeros(inside.shape, dtype=torch.long)
    index[inside] = torch.arange(int(lengths.sum()))
    return index, inside.flatten().nonzero().flatten()


class RowRotary(torch.nn.Module):
    """Rotary angles of the rows of a pack by their positions, [T, 1, 1, dim], in place of those of one long sequence.

    Stands in a GPTModel's `rotary_pos_emb`, which asks for the length just before it asks for the angles.
    """

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self.positions: Tensor | None = None

    def get_rotary_seq_len(self, context: Any, decoder: Any, rows: Any, config: Any, packed: PackedSequences) -> int:
        self.positions = packed.positions
        return self.rotary.get_rotary_seq_len(context, decoder, rows, config, packed)

    def forward(self, max_seq_len: int, **kwargs: Any) -> Tensor:
        return self.rotary.get_emb(max_seq_len)[self.positions]


class PackedCausalAttention(torch.nn.Module):
    """Fits the core_attention place of megatron-core's SelfAttention. q, k, v are [T, 1, heads, dim]; returns [T, 1, heads * dim of v].

    Values may be narrower than queries and keys (MLA): they are then padded, since torch's flash kernels want one width and its other
    kernel keeps the whole score matrix.
    """

    def __init__(self, config: Any, layer_number: int, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, packed_seq_params: PackedSequences, **kwargs: Any
    ) -> Tensor:
        packed, width = packed_seq_params, value.shape[-1]
        value = F.pad(value, (0, query.shape[-1] - width))
        if packed.gathered is not None:
            group = parallel_state.get_context_parallel_group()
            both = torch.cat([key, value], dim=-1)
            # forward all-gather, backward reduce-scatter: each rank's queries attend to all keys, so gradients add up
            both = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=group).index_select(
                0, packed.gathered
            )
            key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)

        def rectangle(x: Tensor, index: Tensor) -> Tensor:  # [T, 1, heads, dim] -> [segments, heads, longest, dim]
            return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[2:]).transpose(1, 2)

        assert packed.query_index is not None and packed.key_index is not None
        out = F.scaled_dot_product_attention(
            rectangle(query, packed.query_index),
            rectangle(key, packed.key_index),
            rectangle(value, packed.key_index),
            attn_mask=packed.mask,
            is_causal=packed.mask is None,
            scale=self.scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out[..., :width].transpose(1, 2).flatten(0, 1).index_select(0, packed.cells).flatten(1).unsqueeze(1)
