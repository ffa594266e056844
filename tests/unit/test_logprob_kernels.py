"""The Triton kernels of the log-probabilities, in Triton's interpreter on a CPU, against torch's operators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PRELUDE = """
import torch
from megarl.engine import logprob, logprob_kernels
from megarl.engine.logprob import vocab_parallel_logprobs

logprob_kernels.BLOCK, logprob_kernels.WARPS = 64, 4
torch.manual_seed(0)

def drawn(tokens, width, columns, dtype):
    logits = (torch.randn(tokens, width) * 3).to(dtype)
    labels = torch.randint(max(columns, 1), (tokens,))
    return logits, labels, torch.randn(tokens), torch.randn(tokens)

def scores(by_kernel, logits, labels, of_logprobs, of_entropy, temperature, vocab_size):
    logprob._by_kernel = lambda logits: by_kernel
    logits = logits.clone().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(logits, labels, temperature, None, vocab_size)
    ((logprobs * of_logprobs).sum() + (entropy * of_entropy).sum()).backward()
    return logprobs.detach(), entropy.detach(), logits.grad.float()
"""


def interpreted(code: str) -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PRELUDE + code]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_log_probabilities_entropy_and_gradient_are_those_of_the_chunks() -> None:
    """Rows of several blocks and of a part of one, a temperature, padding, float32 and bfloat16."""
    interpreted("""
for tokens, width, columns, temperature, dtype, most in (
    (7, 200, 200, 1.0, torch.float32, 1e-6),
    (5, 130, 97, 0.7, torch.float32, 1e-6),
    (6, 300, 290, 1.3, torch.bfloat16, 1e-2),
    (3, 40, 40, 1.0, torch.float32, 1e-6),
):
    given = drawn(tokens, width, columns, dtype)
    expected, actual = (scores(way, *given, temperature, columns) for way in (False, True))
    for a, b, limit in zip(actual, expected, (4e-6, 4e-6, most)):
        assert (a - b).abs().max() <= limit, (width, columns, (a - b).abs().max())
    assert (actual[2][:, columns:] == 0).all() and (actual[2][:, :columns] != 0).any()
""")


def test_sums_of_two_shards_are_those_of_the_whole() -> None:
    """The second shard's maximum is the lower one in some rows; the third holds padding alone."""
    interpreted("""
logits, labels, *_ = drawn(9, 300, 180, torch.float32)
peak, whole = logprob._sums_by_chunk(logits[:, :180].contiguous(), labels, 180, 0.9, None)
parts = []
for rank in range(3):
    shard = logits[:, 100 * rank : 100 * (rank + 1)]
    columns = min(max(180 - 100 * rank, 0), 100)
    local = labels - 100 * rank
    inside = (local >= 0) & (local < 100)
    logprob.dist.all_reduce = lambda x, op=None, group=None: x.copy_(peak)
    found, sums = logprob._sums_by_kernel(shard, local.clamp(0, 99), columns, 0.9, "a group")
    assert torch.equal(found, peak) and sums.isfinite().all()
    sums[2] *= inside
    parts.append(sums)
assert (sum(parts) - whole).abs().max() < 4e-6, (sum(parts) - whole).abs().max()
assert (parts[2][:2] == 0).all()
""")
