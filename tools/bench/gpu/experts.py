"""One MoE layer of Qwen3-30B-A3B, its two changes one by one: rows
moved by index, the activation fused. Forward and backward.

Each row names what was measured, its time, and the share of the copy ceiling that the bytes it must move would take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tools.bench.gpu.common import DEVICE, ON_GPU, TINY, engine_of, relative, seconds
from tools.bench.gpu.roofline import QWEN3_30B_A3B


def run(smoke: bool) -> Iterator[dict[str, Any]]:
    hf = {**(TINY if smoke else QWEN3_30B_A3B), "num_hidden_layers": 1, "vocab_size": 96}
    _, engine = engine_of(hf, [f"engine.dtype={'auto' if ON_GPU else 'float32'}"], train=True)
    layer = engine.model.bare[0].decoder.layers[0].mlp
    fused = layer.config.bias_activation_fusion
    for tokens in (64,) if smoke else (4096, 32_768):
        yield from permutation(tokens, hf)
        yield from activation(tokens, hf, layer.experts)
    layer.config.bias_activation_fusion = fused


def routes(tokens: int, hf: dict[str, Any]) -> torch.Tensor:
    """bool [tokens, experts], K true a row, drawn evenly."""
    experts = hf["num_experts"]
    generator = torch.Generator(device=DEVICE.device).manual_seed(0)
    chosen = (
        torch.rand(tokens, experts, device=DEVICE.device, generator=generator)
        .topk(hf["num_experts_per_tok"], 1)
        .indices
    )
    return torch.zeros(tokens, experts, dtype=torch.bool, device=DEVICE.device).scatter_(1, chosen, True)


def permutation(tokens: int, hf: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from megatron.core.transformer.moe import moe_utils

    from megarl.engine import permutation as ours

    routing_map, rows = routes(tokens, hf), tokens * hf["num_experts_per_tok"]
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    x = torch.randn(tokens, hf["hidden_size"], device=DEVICE.device, dtype=dtype).requires_grad_()
    grad = torch.randn_like(x)
    probs = (torch.rand(routing_map.shape, device=DEVICE.device) * routing_map).requires_grad_()
    results = {}
    for name, module in (("megatron-core", moe_utils), ("by index", ours)):

        def work(module: Any = module) -> list[torch.Tensor]:
            x.grad = None
            permuted, _, index, *_ = module.permute(
                x, routing_map, probs=probs, num_out_tokens=rows, fused=False, drop_and_pad=False
            )
            out = module.unpermute(
                permuted, index, restore_shape=x.shape, routing_map=routing_map, fused=False, drop_and_pad=False
            )
            out.backward(grad)
            return [out.detach(), x.grad]

        taken, results[name] = seconds(work), work()
        moved = (
            4 * (rows + tokens) * hf["hidden_size"] * x.element_size()
        )  # each of four passes reads one side and writes the other
        yield {"row": {"tokens": tokens, "what": f"rows {name}", "seconds": taken, "bytes_per_s": moved / taken}}
    difference = [relative(a, b) for a, b in zip(results["by index"], results["megatron-core"], strict=True)]
    yield {
        "row": {"tokens": tokens, "what": "rows, difference", "difference": difference, "equal": max(difference) < 1e-2}
    }


def activation(tokens: int, hf: dict[str, Any], experts: Any) -> Iterator[dict[str, Any]]:
    counts = routes(tokens, hf).sum(0).cpu()
    rows = int(counts.sum())
    dtype = next(experts.parameters()).dtype
    x = torch.randn(rows, hf["hidden_size"], device=DEVICE.device, dtype=dtype).requires_grad_()
    probs = torch.rand(rows, device=DEVICE.device).requires_grad_()
    grad = torch.randn_like(x)
    results = {}
    for fused in (False, True):
        experts.config.bias_activation_fusion = fused

        def work() -> list[torch.Tensor]:
            x.grad = probs.grad = None
            out = experts(x, counts, probs)[0]
            out.backward(grad)
            return [out.detach(), x.grad, probs.grad]

        taken, results[fused] = seconds(work), work()
        flops = 6 * rows * 3 * hf["hidden_size"] * hf["moe_intermediate_size"]
        what = "experts, activation " + ("fused" if fused else "by torch's operators")
        yield {"row": {"tokens": tokens, "what": what, "seconds": taken, "flops_per_s": flops / taken}}
    difference = [relative(a, b) for a, b in zip(results[True], results[False], strict=True)]
    yield {
        "row": {
            "tokens": tokens,
            "what": "experts, difference",
            "difference": difference,
            "equal": max(difference) < 2e-2,
        }
    }
