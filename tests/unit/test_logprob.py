"""Vocabulary-parallel log-probabilities against plain PyTorch; the split over ranks is held by tests/parallel."""

from __future__ import annotations

import pytest
import torch

from megarl.engine import logprob
from megarl.engine.logprob import mask_padding, vocab_parallel_logprobs


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


def test_padded_columns_are_never_chosen() -> None:
    logits = torch.zeros(2, 8)
    masked = mask_padding(logits, vocab_size=13, rank=1)  # 5 of 8 columns are real
    logprobs, _ = vocab_parallel_logprobs(masked, torch.tensor([0, 4]))
    torch.testing.assert_close(logprobs, torch.full((2,), -torch.log(torch.tensor(5.0)).item()))
    assert mask_padding(logits, vocab_size=16, rank=1) is logits
