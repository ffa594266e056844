"""Rows to the experts and back by index: gathers both ways, forward and backward.

megatron-core (moe_utils.py, permute and unpermute) adds the rows of a
token up with scatter_add, and index_select's backward with
index_add: on a GPU atomics, in an order that changes, rounded to bf16 after each of the K
additions. Here the inverse index is kept, and the sum over a token's K rows is one kernel
that gathers and adds in float32, in the order of the experts. Shape letters: T tokens, E
experts, K experts a token, N = T K rows sorted by expert and then by token, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import Tensor

from megarl.engine import megatron_compat


@dataclass(frozen=True)
class Rows:
    """Where the rows are; megatron-core's dispatcher hands it from permute to unpermute without looking inside."""

    token_N: Tensor
    row_TK: Tensor


def install() -> None:
    """In megatron-core's all-to-all dispatcher, for this process. Its
    fused (Transformer Engine) and capacity variants stay as they are.
    """
    token_dispatcher.__dict__.update(permute=permute, unpermute=unpermute, sort_chunks_by_idxs=sort_chunks_by_idxs)


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    *,
    fused: bool = False,
    drop_and_pad: bool = False,
    **counts: Any,
) -> tuple[Any, ...]:
    """tokens [T, H], routing_map bool [T, E] with K true a row, probs
    [T, E] -> rows [N, H], their probabilities [N], Rows, and what else this release returns.
    """
    if fused or drop_and_pad or not num_out_tokens:
        return moe_utils.permute(
            tokens, routing_map, probs, num_out_tokens, fused=fused, drop_and_pad=drop_and_pad, **counts
        )
    # Of a known size: megatron-core's masked_select waits for the device to learn it. Fewer rows than that would be an
    # index of -1.
    expert_N, token_N = torch.nonzero_static(routing_map.t(), size=num_out_tokens).unbind(1)
    rows = Rows(token_N, token_N.argsort(stable=True).view(len(tokens), -1))
    probs_N = None if probs is None else probs.flatten().index_select(0, token_N * probs.shape[1] + expert_N)
    return megatron_compat.permuted(_Spread.apply(tokens, rows), probs_N, rows, counts.get("tokens_per_expert"))


def unpermute(
    permuted: Tensor, rows: Any, restore_shape: torch.Size, probs: Tensor | None = None, **variant: Any
) -> Tensor:
    """Rows [N, H] summed into their tokens [T, H]."""
    if not isinstance(rows, Rows) or probs is not None:
        return moe_utils.unpermute(permuted, rows, restore_shape, probs, **variant)
    return _Collect.apply(permuted, rows)


def sort_chunks_by_idxs(
    rows: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, probs: Tensor | None = None, fused: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same rows where the chunks are in order already, as on one
    rank, where megatron-core copies all of them in E pieces.
    """
    if not fused and bool((sorted_idxs.diff() == 1).all()):  # sorted_idxs lies on the CPU unless fused
        return rows, probs
    return moe_utils.sort_chunks_by_idxs(rows, split_sizes, sorted_idxs, probs, fused)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_TH: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return tokens_TH.index_select(0, rows.token_N)

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None]:
        return _sum(grad_NH, ctx.rows.row_TK), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _sum(rows_NH, rows.row_TK)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None]:
        return grad_TH.index_select(0, ctx.rows.token_N), None


def _sum(x_NH: Tensor, row_TK: Tensor) -> Tensor:
    """[T, H]: an embedding bag is a gather and a sum in one kernel, accumulated in float32."""
    return F.embedding_bag(row_TK, x_NH.contiguous(), mode="sum")
