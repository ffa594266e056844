"""Vocabulary-parallel log-probabilities against plain PyTorch; the split over ranks is held by tests/parallel."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.engine import logprob
from megarl.engine.logprob import vocab_parallel_logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [3 * 13, 2**24])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, temperature: float, chunk: int) -> None:
    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(10, 13, generator=generator) * 4).requires_grad_()
    labels = torch.randint(13, (10,), generator=generator)
    weight_lp, weight_h = torch.randn(10, generator=generator), torch.randn(10, generator=generator)

    logprobs, entropy = vocab_parallel_logprobs(logits, labels, temperature)
    (grad,) = torch.autograd.grad((logprobs * weight_lp + entropy * weight_h).sum(), logits)

    log_p = (logits.double() / temperature).log_softmax(-1)
    want, want_h = log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    (want_grad,) = torch.autograd.grad((want * weight_lp + want_h * weight_h).sum(), logits)
    torch.testing.assert_close(logprobs.double(), want, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), want_h, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(grad, want_grad, atol=2e-6, rtol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, 0.0], [0.0, -1e4]], requires_grad=True)
    logprobs, entropy = vocab_parallel_logprobs(logits, torch.tensor([1, 0]))
    assert logprobs.tolist() == [-1e4, 0.0] and entropy.tolist() == [0.0, 0.0]
    logprobs.sum().backward()
    assert torch.isfinite(logits.grad).all()


class Threads:
    """torch.distributed of ranks that are threads of this process: what engine/logprob.py calls of it."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.given = size, threading.Barrier(size, timeout=60), [torch.empty(0)] * size

    def get_world_size(self, group: Any) -> int:
        return self.size

    def get_rank(self, group: Any) -> int:
        return group

    def all_reduce(self, tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM, group: Any = None) -> None:
        self.given[group] = tensor.clone()
        self.barrier.wait()
        together = torch.stack(self.given)
        tensor.copy_(together.amax(0) if op == self.ReduceOp.MAX else together.sum(0))
        self.barrier.wait()


@dataclass
class Case:
    logits: Tensor  # [T, whole vocabulary], leaf
    labels: Tensor
    weights: Tensor  # [2, T]: of log-probability and entropy in the loss


def parallel(case: Case, temperature: float, tp: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropy and gradient [T, padded vocabulary], of `tp` ranks with zeros for padding."""
    vocab_size = case.logits.shape[1]
    padding = -vocab_size % tp
    shards = torch.nn.functional.pad(case.logits.detach(), (0, padding)).chunk(tp, dim=1)
    monkeypatch.setattr(logprob, "dist", Threads(tp))

    def rank(number: int) -> tuple[Tensor, ...]:
        shard = shards[number].clone().requires_grad_()
        results = vocab_parallel_logprobs(shard, case.labels, temperature, number, vocab_size)  # type: ignore[arg-type]
        (torch.stack(results) * case.weights).sum().backward()
        return *(x.detach() for x in results), shard.grad

    with ThreadPoolExecutor(tp) as pool:
        ranks = list(pool.map(rank, range(tp)))
    for logprobs, entropy, _ in ranks:
        assert torch.equal(logprobs, ranks[0][0]) and torch.equal(entropy, ranks[0][1])
    return ranks[0][0], ranks[0][1], torch.cat([grad for _, _, grad in ranks], dim=1)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("vocab_size", [5, 101])  # 5 over 4 ranks: the last one has padding alone
def test_fault_01_padded_vocabularies_at_any_temperature(
    monkeypatch: pytest.MonkeyPatch, vocab_size: int, temperature: float, dtype: torch.dtype, tp: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(7, vocab_size, generator=generator) * 4).to(dtype)
    logits[0] -= 128  # far below the zeros that stand in padding
    case = Case(
        logits.requires_grad_(),
        torch.randint(vocab_size, (7,), generator=generator),
        torch.randn(2, 7, generator=generator),
    )
    logprobs, entropy, grad = parallel(case, temperature, tp, monkeypatch)
    log_p = (case.logits.double() / temperature).log_softmax(-1)
    want = torch.stack([log_p.gather(1, case.labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)])
    (want_grad,) = torch.autograd.grad((want * case.weights).sum(), case.logits)
    torch.testing.assert_close(torch.stack([logprobs, entropy]).double(), want, atol=3e-5, rtol=1e-6)
    tolerance = dict(atol=3e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=3e-5, rtol=2**-7)
    torch.testing.assert_close(grad[:, :vocab_size], want_grad, **tolerance)
    assert not grad[:, vocab_size:].any()
