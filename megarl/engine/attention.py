"""Core attention over packed sequences for layer specs without Transformer Engine: torch's scaled_dot_product_attention.

Each sequence of a pack is right-padded to the longest one and attended causally; what the padding computes is dropped. So there is
no mask of [tokens, tokens], nothing attends across a border, and the flash kernels of torch apply on a CPU and on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packed parameters and where each token lies in the padded [sequences, longest] rectangle."""

    rectangle: tuple[int, int] = (0, 0)
    pad_index: Tensor | None = None  # [sequences * longest] -> token; padding points to token 0
    unpad_index: Tensor | None = None  # [tokens] -> cell of the rectangle


def packed_sequences(cu_seqlens: Tensor) -> PackedSequences:
    """cu_seqlens int32 [sequences + 1], from 0 to the number of tokens of the pack."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    longest = int(lengths.max())
    inside = torch.arange(longest, device=cu_seqlens.device) < lengths[:, None]
    pad_index = torch.zeros(inside.numel(), dtype=torch.long, device=cu_seqlens.device)
    unpad_index = inside.flatten().nonzero().flatten()
    pad_index[unpad_index] = torch.arange(unpad_index.numel(), device=cu_seqlens.device)
    return PackedSequences(
        qkv_format="sbhd",  # rows with a batch of one: Megatron then leaves rotation and attention to the modules below
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        rectangle=(len(lengths), longest),
        pad_index=pad_index,
        unpad_index=unpad_index,
    )


class RowRotary(torch.nn.Module):
    """Rotary angles of the rows of a pack by their positions, [T, 1, 1, dim], in place of those of one long sequence.

    Stands in a GPTModel's `rotary_pos_emb`. `positions` (int64 [T], this rank's rows) is set before each forward.
    """

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self.positions: Tensor | None = None

    def get_rotary_seq_len(self, *args: Any) -> int:
        return self.rotary.get_rotary_seq_len(*args)

    def forward(self, max_seq_len: int, **kwargs: Any) -> Tensor:
        return self.rotary.get_emb(max_seq_len)[self.positions]


class PackedCausalAttention(torch.nn.Module):
    """Fits the core_attention place of megatron-core's SelfAttention. q, k, v are [T, 1, heads, dim]; returns [T, 1, heads * dim]."""

    def __init__(self, config: Any, layer_number: int, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, packed_seq_params: PackedSequences, **kwargs: Any
    ) -> Tensor:
        sequences, longest = packed_seq_params.rectangle

        def rectangle(x: Tensor) -> Tensor:  # [T, 1, heads, dim] -> [sequences, heads, longest, dim]
            return x.index_select(0, packed_seq_params.pad_index).view(sequences, longest, *x.shape[2:]).transpose(1, 2)

        grouped = query.shape[2] != key.shape[2]
        out = F.scaled_dot_product_attention(
            rectangle(query), rectangle(key), rectangle(value), is_causal=True, scale=self.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, packed_seq_params.unpad_index).flatten(1).unsqueeze(1)
