"""Log-probabilities and entropy over a vocabulary that is split over
tensor-parallel ranks, without gathering the logits.

No float32 copy of [tokens, vocabulary] ever exists beside the logits: on a GPU with Triton each pass is one kernel
(logprob_kernels.py), elsewhere both go over the tokens in chunks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 2**24  # logits a chunk: 64 MiB in float32, whatever the vocabulary


class _VocabParallelLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        vocab_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        size, rank = (dist.get_world_size(group), dist.get_rank(group)) if group is not None else (1, 0)
        tokens, columns = logits.shape
        real_columns = (
            columns if vocab_size is None else min(max(vocab_size - rank * columns, 0), columns)
        )  # the rest is padding
        local = labels - rank * columns  # label as a column of this rank's shard
        inside = (local >= 0) & (local < columns)
        local = local.clamp(0, columns - 1)
        sums = _sums_by_kernel if _by_kernel(logits) else _sums_by_chunk
        peak, stats = sums(logits, local, real_columns, temperature, group if size > 1 else None)
        stats[2] *= inside
        if size > 1:
            dist.all_reduce(stats, group=group)
        log_z = stats[0].log()
        logprobs = stats[2] - log_z
        entropy = log_z - stats[1] / stats[0]
        ctx.save_for_backward(logits, local, inside, peak + log_z, entropy)
        ctx.temperature, ctx.real_columns = temperature, real_columns
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, local, inside, log_z, entropy = ctx.saved_tensors
        grads = (grad_logprobs, grad_entropy)
        sizes = (ctx.real_columns, ctx.temperature)
        gradient: Callable[..., Tensor] = _gradient_by_chunk
        if _by_kernel(logits):
            from megarl.engine import logprob_kernels

            gradient = logprob_kernels.gradient
        return gradient(logits, local, inside, log_z, entropy, *grads, *sizes), None, None, None, None


def _by_kernel(logits: Tensor) -> bool:
    return logits.is_cuda and logits.stride(1) == 1 and importlib.util.find_spec("triton") is not None


def _sums_by_kernel(
    logits: Tensor, labels: Tensor, columns: int, temperature: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """As `_sums_by_chunk`."""
    from megarl.engine.logprob_kernels import row_sums

    own, stats = row_sums(logits, labels, columns, temperature)
    peak = own
    if group is not None:
        peak = own.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        down = own - peak
        stats[1] = (stats[1] + down * stats[0]) * down.exp()
        stats[0] *= down.exp()
    stats[2] -= peak
    return peak, stats


def _sums_by_chunk(
    logits: Tensor, labels: Tensor, columns: int, temperature: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Highest logit of each row over `group`, float32 [T], and of this shard, relative to it: sum exp, sum exp * logit
    and the label's logit, float32 [3, T].
    """
    tokens = logits.shape[0]
    peak = torch.full((tokens,), -torch.inf, dtype=torch.float32, device=logits.device)
    stats = torch.empty(3, tokens, dtype=torch.float32, device=logits.device)
    for part in _chunks(logits) if columns else []:
        peak[part] = logits[part, :columns].amax(1).float() / temperature
    if group is not None:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    for part in _chunks(logits):
        shifted = logits[part].to(torch.float32, copy=True).div_(temperature).sub_(peak[part, None])
        exp = shifted.exp()
        exp[:, columns:] = 0
        stats[0, part] = exp.sum(1)
        stats[2, part] = shifted.gather(1, labels[part, None]).squeeze(1)
        stats[1, part] = exp.mul_(shifted).sum(1)
    return peak, stats


def _gradient_by_chunk(
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
    """As logprob_kernels.gradient."""
    grad = torch.empty_like(logits)
    for part in _chunks(logits):
        log_p = logits[part].to(torch.float32, copy=True).div_(temperature).sub_(log_z[part, None])
        p = log_p.exp()
        # d logprob / d logit = 1[label] - p;  d entropy / d logit = -p (log p + entropy)
        g = (
            log_p.add_(entropy[part, None])
            .mul_(grad_entropy[part, None])
            .add_(grad_logprobs[part, None])
            .mul_(p)
            .neg_()
        )
        g.scatter_add_(1, labels[part, None], (grad_logprobs[part] * inside[part])[:, None])
        g[:, columns:] = 0
        grad[part] = g.div_(temperature)
    return grad


def _chunks(logits: Tensor) -> list[slice]:
    each = max(1, CHUNK_ELEMENTS // logits.shape[1])
    return [slice(i, i + each) for i in range(0, logits.shape[0], each)]


def vocab_parallel_logprobs(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[label] and the entropy of that distribution, in nats.

    logits: [T, V / TP], this rank's columns; labels: int64 [T], numbers of the whole
    vocabulary. vocab_size: columns from there on are padding of the last shards, which can
    never be chosen; their gradient is zero. Both results are float32 [T], equal on all ranks
    of `group`, and differentiable in the logits.
    """
    return _VocabParallelLogprob.apply(logits, labels, temperature, group, vocab_size)
