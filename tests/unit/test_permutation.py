"""Rows to the experts and back by index, against megatron-core's own functions."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe import moe_utils, token_dispatcher

from megarl.engine import permutation
from megarl.engine.device import setup_device

setup_device()
PLAIN = dict(fused=False, drop_and_pad=False)


def routes(tokens, experts, k, seed=0):
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    chosen = scores.topk(k, 1).indices
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True), torch.zeros_like(scores).scatter(
        1, chosen, scores
    )


def there_and_back(module, x, routing_map, probs, grad):
    """Output, permuted rows, and gradients of tokens and probabilities;
    each row is scaled by its probability on the way.
    """
    x, probs = x.clone().requires_grad_(), probs.clone().requires_grad_()
    rows = int(routing_map.sum())
    permuted, probs_N, index, *_ = module.permute(x, routing_map, probs=probs, num_out_tokens=rows, **PLAIN)
    scaled = (permuted * probs_N[:, None]).to(x.dtype)
    out = module.unpermute(scaled, index, restore_shape=x.shape, routing_map=routing_map, **PLAIN)
    out.backward(grad)
    return out.detach(), permuted.detach(), x.grad, probs.grad


@pytest.mark.parametrize(("tokens", "experts", "k"), [(7, 4, 1), (40, 8, 2), (33, 16, 5), (6, 4, 4), (1, 128, 8)])
def test_bitwise_equal_in_float32(tokens, experts, k):
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(tokens, 24, generator=generator), torch.randn(tokens, 24, generator=generator)
    routing_map, probs = routes(tokens, experts, k)
    ours, core = (there_and_back(module, x, routing_map, probs, grad) for module in (permutation, moe_utils))
    assert all(torch.equal(a, b) for a, b in zip(ours, core))


def test_a_gradient_that_is_not_contiguous():
    """As that of a plain sum, which has no memory of its own."""
    routing_map, probs = routes(9, 4, 2)
    x = torch.randn(9, 8)
    ours, core = (
        there_and_back(module, x, routing_map, probs, torch.ones(()).expand(9, 8))
        for module in (permutation, moe_utils)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, core))


def test_sums_of_bfloat16_rows_are_rounded_once():
    """The K rows of a token are added in float32. (A sum half-way
    between two numbers goes up on a CPU, to even elsewhere.)
    """
    routing_map, _ = routes(200, 16, 8)
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    permuted, _, index, *_ = permutation.permute(x, routing_map, num_out_tokens=1600, **PLAIN)
    rows = permuted * torch.linspace(0.5, 2, 1600).bfloat16()[:, None]
    exact = torch.zeros(200, 32, dtype=torch.float64).index_add_(0, index.token_N, rows.double())
    error = (permutation.unpermute(rows, index, x.shape, **PLAIN).double() - exact).abs()
    least = (exact.bfloat16().double() - exact).abs()
    assert (error <= 1.001 * least + 1e-12).all()


def test_no_tokens_and_megatrons_other_variants_go_to_megatron():
    routing_map, probs = routes(0, 4, 2)
    out, *_ = there_and_back(permutation, torch.zeros(0, 8), routing_map, probs, torch.zeros(0, 8))
    assert out.shape == (0, 8)
    routing_map, _ = routes(6, 4, 2)
    with pytest.raises(ValueError, match="Transformer Engine|install TE"):
        permutation.permute(torch.zeros(6, 8), routing_map, num_out_tokens=12, fused=True)


def test_a_token_with_fewer_experts_than_the_others_is_an_error():
    routing_map, probs = routes(6, 4, 2)
    routing_map[3] = False
    with pytest.raises((IndexError, RuntimeError)):
        permutation.permute(torch.zeros(6, 8), routing_map, probs, 12, **PLAIN)


def test_chunks_in_order_are_not_copied_others_are_sorted():
    rows, probs, sizes = torch.randn(6, 3), torch.rand(6), torch.tensor([1, 2, 0, 3])
    same, same_probs = permutation.sort_chunks_by_idxs(rows, sizes, torch.arange(4), probs)
    assert same is rows and same_probs is probs
    order = torch.tensor([2, 0, 3, 1])
    for got, want in zip(
        *(module.sort_chunks_by_idxs(rows, sizes, order, probs) for module in (permutation, moe_utils))
    ):
        assert torch.equal(got, want) and got is not rows


def test_the_layers_that_are_built_use_it(monkeypatch):
    """megatron-core's dispatcher calls what install() puts there (megarl.engine.specs does)."""
    for name in ("permute", "unpermute", "sort_chunks_by_idxs"):
        monkeypatch.setattr(token_dispatcher, name, getattr(moe_utils, name))
    permutation.install()
    assert token_dispatcher.permute is permutation.permute and token_dispatcher.unpermute is permutation.unpermute
    assert token_dispatcher.sort_chunks_by_idxs is permutation.sort_chunks_by_idxs
