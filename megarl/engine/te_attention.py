"""Transformer Engine's attention over packed sequences. Imported only where Transformer Engine is chosen
(engine/specs.py).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megarl.engine.attention import PackedSequences


class TePackedAttention(TEDotProductAttention):
    """q, k, v are [T, 1, heads, dim], as our own attention takes them; returns [T, 1, heads * dim].

    Megatron sees rows with a batch of one, so that the rotation stays the one of
    engine/attention.py (one product, by position); only the kernel sees the packed
    layout (THD). Padding at the pack's end is a sequence of its own in cu_seqlens.
    """

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
        packed = PackedSeqParams(**{f.name: getattr(packed_seq_params, f.name) for f in fields(PackedSeqParams)})
        packed.qkv_format = "thd"
        out = super().forward(
            query.squeeze(1), key.squeeze(1), value.squeeze(1), None, packed_seq_params=packed, **kwargs
        )
        return out.reshape(len(query), 1, -1)
