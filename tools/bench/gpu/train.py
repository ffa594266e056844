"""Training tokens a second and MFU of a slice of Qwen3-30B-A3B: 4k and
32k packed tokens, R3 off and on, grouped and sequential experts.

One micro-batch, through Engine.gradients and the learner's own loss; Adam apart. Depths 1 and as many layers as fit
give the time of one layer and of the output layer, and from these the figure for all 48 layers.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch

from tools.bench.gpu.common import DEVICE, ON_GPU, TINY, describe_profile, engine_of, packs_of, peak_bytes, seconds
from tools.bench.gpu.roofline import PEAK, QWEN3_30B_A3B, forward_flops, layers_that_fit, training_flops

CASES = [(4096, "grouped"), (32_768, "grouped"), (4096, "sequential"), (32_768, "sequential")]
SEQUENCE = 4096
ROOM = 0.6  # of the memory: with 0.95 ten layers did not fit an H200, and what a failed one holds is not given back


def run(smoke: bool, number: int) -> Iterator[dict[str, Any]]:
    """One of CASES, of a depth that leaves room for what `layers_that_fit` does not count."""
    tokens, experts = CASES[number]
    depth = 2
    if not smoke:
        depth = layers_that_fit(QWEN3_30B_A3B, tokens, ROOM * torch.cuda.get_device_properties(0).total_memory)
    yield {"peak_flops": PEAK}
    yield from case(64 if smoke else tokens, experts, depth, smoke)


def _free() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def case(tokens: int, experts: str, depth: int, smoke: bool) -> Iterator[dict[str, Any]]:
    """What each of two depths took, then the row made of both."""
    hf, sequence = (TINY, 32) if smoke else (QWEN3_30B_A3B, SEQUENCE)
    shallow = _depth(hf, tokens, sequence, experts, 1, ("off",), smoke)
    yield {"one_layer": shallow}
    _free()
    deep = _depth(hf, tokens, sequence, experts, depth, ("off", "replay"), smoke)
    _free()
    off, flops = deep["gradients_s"]["off"], training_flops(hf, depth, sequence)
    layer_s = (off - shallow["gradients_s"]["off"]) / max(1, depth - 1)
    head_s = max(0.0, shallow["gradients_s"]["off"] - layer_s)
    layer, head = forward_flops(hf, sequence)
    row = {
        "tokens": tokens,
        "sequence": sequence,
        "experts": experts,
        "layers": depth,
        "tokens_per_s": tokens / off,
        "mfu": tokens * flops / off / PEAK,
        "mfu_with_optimizer": tokens * flops / (off + deep["optimizer_s"]) / PEAK,
        "mfu_of_a_layer": 3 * tokens * layer / layer_s / PEAK if layer_s > 0 else None,
        "mfu_of_48_layers": 3 * tokens * (48 * layer + head) / (48 * layer_s + head_s) / PEAK if layer_s > 0 else None,
        "replay_cost": deep["gradients_s"]["replay"] / off - 1,
        "layer_s": layer_s,
        "rest_s": head_s,
        **deep,
    }
    yield {"row": row}


def _depth(
    hf: dict[str, Any], tokens: int, sequence: int, experts: str, depth: int, modes: tuple[str, ...], smoke: bool
) -> dict[str, Any]:
    from megarl.loop.learn import Learner

    options = [f"engine.experts={experts}", "replay.mode=R3", f"engine.dtype={'auto' if ON_GPU else 'float32'}"]
    config, engine = engine_of({**hf, "num_hidden_layers": depth}, options, train=True)
    packs = packs_of(engine, tokens, sequence)
    engine.logprobs(packs, "record")
    [pack] = packs
    pack.rollout.routes = pack.passes.live_routes
    assert pack.rollout.routes is not None
    counts = torch.stack(
        [pack.rollout.routes[:, layer].flatten().long().bincount(minlength=hf["num_experts"]) for layer in range(depth)]
    ).float()
    learner = Learner(config, engine)
    repeats, warm_up = (1, 1) if smoke else (7, 3)
    update = lambda mode: engine.gradients(packs, mode, learner._loss)
    figures: dict[str, Any] = {
        "profile": describe_profile(engine),
        "imbalance": float((counts.amax(1) / counts.mean(1)).mean()),  # busiest expert over the mean
        "gradients_s": {mode: seconds(lambda mode=mode: update(mode), repeats, warm_up) for mode in modes},
        "logprob_pass_s": seconds(lambda: engine.logprobs(packs, "off"), repeats, 1),
        "peak_bytes": peak_bytes(lambda: update("off")),
        "optimizer_s": seconds(lambda: engine.optimizer.step(), 1 if smoke else 3, 1),
    }
    if "replay" in modes:
        figures["kernels"] = _kernels(lambda: update("replay"))
    return figures


def _kernels(work: Any) -> list[dict[str, Any]]:
    """The twenty kernels (operators on a CPU) that took longest in one call."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if ON_GPU else [])
    with profile(activities=kinds) as profiled:
        work()
        if ON_GPU:
            torch.cuda.synchronize(DEVICE.device)
    time_of = lambda event: event.self_device_time_total if ON_GPU else event.self_cpu_time_total
    events = sorted(profiled.key_averages(), key=time_of, reverse=True)[:20]
    return [{"name": event.key[:120], "calls": event.count, "ms": time_of(event) / 1e3} for event in events]
