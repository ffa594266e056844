"""What stays in float32 in a bf16 model: the router's scores and the
log-softmax; and what engine.deterministic changes.
"""

from __future__ import annotations

import pytest
import torch

from tools.bench.gpu.common import (
    TINY,
    engine_of,
    packs_of,
    relative,
)  # sets the device up before megatron-core is imported
from tools.bench.gpu.correctness import _loss

# isort: split
from megarl.engine import step
from megarl.engine.device import make_deterministic

SETTLED = 1e-6  # relative error of float32 arithmetic; bf16's is above 1e-3


pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def bf16():
    _, engine = engine_of(TINY, ["engine.dtype=bfloat16", "train.lr=1e-2"], train=True)
    return engine, packs_of(engine, 128, 32)


def test_the_router_scores_in_float32(bf16):
    """From bf16 activations and weights; the probabilities that scale
    the experts, and those of replay, are float32 too.
    """
    engine, packs = bf16
    seen = []
    for _, router in engine.model.routers():
        router.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
        gating = router.gating
        router.gating = lambda x, gating=gating: seen.append(gating(x)) or seen[-1]
    engine.gradients(packs, "record", _loss)
    assert len(seen) == 4
    for scores, (router, hidden, (probs, _)) in zip(seen[::2], seen[1::2]):
        assert hidden.dtype == router.weight.dtype == torch.bfloat16
        exact = hidden.detach().double() @ router.weight.detach().double().t()
        assert scores.dtype == probs.dtype == torch.float32
        assert relative(scores, exact) < SETTLED
        chosen = exact.view(-1, 8).softmax(-1).topk(2).values
        assert (
            relative(probs.view(-1, 8).sort(-1).values[:, -2:].flip(-1), chosen / chosen.sum(-1, keepdim=True))
            < SETTLED
        )


def test_log_probabilities_are_float32_of_bf16_logits(bf16, monkeypatch):
    """And no float32 copy of the logits is made on the way, nor of their gradient."""
    engine, packs = bf16
    seen = []

    def spy(logits, *args):
        seen.append(logits)
        if logits.requires_grad:
            logits.retain_grad()
        return plain(logits, *args)

    plain = step.vocab_parallel_logprobs
    monkeypatch.setattr(step, "vocab_parallel_logprobs", spy)
    [(logprobs, entropy)] = engine.logprobs(packs, "off")
    [logits] = seen
    assert logits.dtype == torch.bfloat16 and logprobs.dtype == entropy.dtype == torch.float32
    log_p = logits.double().log_softmax(-1)
    assert relative(logprobs, log_p.gather(1, packs[0].labels[:, None])[:, 0]) < SETTLED
    assert relative(entropy, -(log_p.exp() * log_p).sum(1)) < SETTLED
    engine.gradients(packs, "off", _loss)
    assert seen[1].grad.dtype == torch.bfloat16


def test_master_weights_and_gradients_are_float32(bf16):
    engine, packs = bf16
    engine.update(packs, "off", _loss)
    for param, tensor in engine.model.params():
        assert tensor.main_grad.dtype == tensor.main_param.dtype == torch.float32, param.name
        assert torch.equal(tensor, tensor.main_param.view_as(tensor).bfloat16()), param.name


def test_deterministic_kernels_compute_the_same():
    """engine.deterministic. torch fills fresh memory with NaN in this
    mode: an update that read any would not be finite.
    """
    results = []
    try:
        for deterministic in (False, True, True):
            if deterministic:
                make_deterministic()
            _, engine = engine_of(TINY, [f"engine.deterministic={deterministic}", "engine.dtype=float32"], train=True)
            packs = packs_of(engine, 128, 32)
            engine.update(packs, "record", _loss)
            assert (
                engine.model.config.deterministic_mode == torch.are_deterministic_algorithms_enabled() == deterministic
            )
            assert torch.empty(8).isnan().all() or not deterministic
            results.append(torch.cat([tensor.detach().flatten() for _, tensor in engine.model.params()]))
    finally:
        torch.use_deterministic_algorithms(False)
    plain, first, second = results
    assert first.isfinite().all() and torch.equal(first, second) and relative(first, plain) < SETTLED
