"""The two passes of megarl/engine/logprob.py over the logits as Triton kernels, for GPUs: each reads every logit once.
Operators of torch, so that the simulated GPU (megarl/simulate) knows their results without running them.

By torch's operators, chunk by chunk, the logits are moved some twenty times: on an H200 32,768 tokens of 151,936
entries took 245 ms forward and backward, by these kernels 11 ms (docs/gpu.md).
"""

# ruff: noqa: ANN001, ANN202 (Triton gives a kernel's arguments types of its own)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits of a row that a program holds at a time
WARPS = 16
LOWEST = tl.constexpr(-1e30)  # below every logit and finite: a shard without a real column has sums of 0, not NaN


@triton.jit
def _row_sums(logits, labels, peaks, sums, tokens, stride, columns, temperature, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    start_of_row = logits + row * stride
    peak = LOWEST
    total = 0.0
    weighted = 0.0
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        real = column < columns
        x = tl.load(start_of_row + column, mask=real, other=-float("inf")).to(tl.float32) / temperature
        higher = tl.maximum(peak, tl.max(x, 0))
        scale = tl.exp(peak - higher)
        weighted = scale * (weighted + (peak - higher) * total)
        shifted = x - higher
        exp = tl.exp(shifted)
        total = total * scale + tl.sum(exp, 0)
        weighted += tl.sum(tl.where(real, exp * shifted, 0.0), 0)
        peak = higher
    target = tl.load(start_of_row + tl.load(labels + row)).to(tl.float32) / temperature
    tl.store(peaks + row, peak)
    tl.store(sums + row, total)
    tl.store(sums + tokens + row, weighted)
    tl.store(sums + 2 * tokens + row, target)


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits,
    grad,
    labels,
    inside,
    log_z,
    entropy,
    grad_logprob,
    grad_entropy,
    stride,
    width,
    columns,
    temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < columns
    x = tl.load(logits + row * stride + column, mask=real, other=0.0).to(tl.float32) / temperature
    log_p = x - tl.load(log_z + row)
    of_logprob = tl.load(grad_logprob + row)
    g = -tl.exp(log_p) * ((log_p + tl.load(entropy + row)) * tl.load(grad_entropy + row) + of_logprob)
    chosen = (column == tl.load(labels + row)) & (tl.load(inside + row) != 0)
    g = tl.where(real, (g + tl.where(chosen, of_logprob, 0.0)) / temperature, 0.0)
    tl.store(grad + row * width + column, g.to(grad.dtype.element_ty), mask=column < width)


@torch.library.custom_op("megarl::logits_row_sums", mutates_args=())
def row_sums(logits: Tensor, labels: Tensor, columns: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Over the first `columns` of each row, x = logits / temperature: max x, float32 [T]; and float32 [3, T] of
    sum exp(x - max), sum exp(x - max) (x - max) and x[label]. labels: int64 [T], columns of this shard.
    """
    tokens = logits.shape[0]
    peaks = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    sums = torch.empty(3, tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        sizes = (tokens, logits.stride(0), columns, temperature)
        _row_sums[(tokens,)](logits, labels, peaks, sums, *sizes, BLOCK=BLOCK, num_warps=WARPS)
    return peaks, sums


@row_sums.register_fake
def _(logits: Tensor, labels: Tensor, columns: int, temperature: float) -> tuple[Tensor, Tensor]:
    tokens = logits.shape[0]
    return logits.new_empty(tokens, dtype=torch.float32), logits.new_empty(3, tokens, dtype=torch.float32)


@torch.library.custom_op("megarl::logits_gradient", mutates_args=())
def gradient(
    logits: Tensor,
    labels: Tensor,
    inside: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    columns: int,
    temperature: float,
) -> Tensor:
    """The gradient in the logits, [T, V / TP] of their dtype; 0 from `columns` on. inside: whether a row's label is of
    this shard; log_z, of x, and entropy: float32 [T], over all shards.
    """
    tokens, width = logits.shape
    grad = torch.empty(tokens, width, dtype=logits.dtype, device=logits.device)
    if tokens:
        grads = (grad_logprobs.contiguous(), grad_entropy.contiguous())
        sizes = (logits.stride(0), width, columns, temperature)
        grid = (tokens, triton.cdiv(width, BLOCK))
        _gradient[grid](logits, grad, labels, inside, log_z, entropy, *grads, *sizes, BLOCK=BLOCK, num_warps=WARPS)
    return grad


@gradient.register_fake
def _(logits: Tensor, *_: object) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
