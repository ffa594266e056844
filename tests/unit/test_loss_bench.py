"""tools/bench/loss.py: the plain expression it measures against computes the same thing, and needs no less memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.loss import ours, packed, peak_bytes, plain  # noqa: E402


def test_same_loss_gradient_and_metrics_in_as_much_memory() -> None:
    data = packed(16_384, "cpu")
    found = {}
    for variant in (ours, plain):
        data["logprobs"].grad = None
        loss, metrics = variant(data, "minirl")
        found[variant] = (loss.detach(), metrics, data["logprobs"].grad)
        assert data["logprobs"].grad is not None
    (loss, metrics, grad), (plain_loss, plain_metrics, plain_grad) = found[ours], found[plain]
    torch.testing.assert_close((loss, grad), (plain_loss, plain_grad))
    assert metrics == pytest.approx(plain_metrics, rel=1e-4, abs=1e-7)
    assert peak_bytes(lambda: ours(data, "minirl")) <= 1.2 * peak_bytes(lambda: plain(data, "minirl"))
