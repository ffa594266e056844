"""The log-probability pass over 32k tokens x 151,936 entries: tokens a
second, and memory beside the logits (and their gradient).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tools.bench.gpu.common import DEVICE, peak_bytes, seconds

LIMIT = 2 * 2**30  # bytes


def run(smoke: bool) -> Iterator[dict[str, Any]]:
    from megarl.engine.logprob import vocab_parallel_logprobs

    tokens, vocabulary = (64, 1000) if smoke else (32_768, 151_936)
    dtype = torch.bfloat16
    logits = torch.randn(tokens, vocabulary, device=DEVICE.device, dtype=dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=DEVICE.device)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return vocab_parallel_logprobs(logits, labels)[0]

    def both() -> None:
        logits.grad = None
        logprobs, entropy = vocab_parallel_logprobs(logits, labels)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()

    size = logits.numel() * logits.element_size()
    forward_s, both_s = seconds(forward, 5, 2), seconds(both, 5, 2)
    logits.grad = None
    extra_forward, extra_both = peak_bytes(forward), peak_bytes(both)
    picked = torch.arange(0, tokens, max(1, tokens // 64), device=DEVICE.device)
    wanted = logits[picked].detach().double().log_softmax(-1).gather(1, labels[picked, None])[:, 0]
    extra_both = None if extra_both is None else extra_both - size  # the gradient itself is what was asked for
    error = float((forward()[picked].double() - wanted).abs().max())
    yield {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "forward_tokens_per_s": tokens / forward_s,
        "tokens_per_s": tokens / both_s,
        "logits_bytes_per_s": size / forward_s,
        "extra_bytes_forward": extra_forward,
        "extra_bytes": extra_both,
        "largest_error": error,
        "passed": error < 1e-4 and max(extra_forward or 0, extra_both or 0) < LIMIT,
    }
