"""What the parts share: timing on a device, an engine of random weights, packs of random tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from megarl.config import Config, load_config
from megarl.engine.device import setup_device
from megarl.engine.model import build_model, wrap_for_training
from megarl.engine.optim import build_optimizer
from megarl.engine.parallel import init_parallel
from megarl.engine.step import Engine
from megarl.weights.map.weight_map import WeightMap
from tools.bench.gpu.roofline import QWEN3_30B_A3B

DEVICE = setup_device()
ON_GPU = DEVICE.device.type == "cuda"
SMALL = dict(
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
    moe_intermediate_size=48,
)
TINY = {**QWEN3_30B_A3B, **SMALL, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 96, "num_hidden_layers": 2}


def seconds(work: Callable[[], Any], repeats: int = 10, warm_up: int = 3) -> float:
    """Median time of one call, by device events on a GPU."""
    times = []
    for i in range(warm_up + repeats):
        if ON_GPU:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            taken = start.elapsed_time(end) / 1e3
        else:
            begun = time.perf_counter()
            work()
            taken = time.perf_counter() - begun
        if i >= warm_up:
            times.append(taken)
    return statistics.median(times)


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """Growth of the allocator's peak over the moment before; None on a CPU."""
    if not ON_GPU:
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def engine_of(hf: dict[str, Any], overrides: list[str], *, train: bool) -> tuple[Config, Engine]:
    """An engine of one rank with weights drawn by a CPU generator: the same on every device. No checkpoint is read."""
    config = load_config(None, overrides)
    parallel = init_parallel(config.parallel, DEVICE, seed=0)
    model = build_model(config, WeightMap(hf), parallel)
    generator = torch.Generator(device=DEVICE.device if hf is not TINY else "cpu").manual_seed(0)
    with torch.no_grad():
        for _, tensor in model.params():
            drawn = torch.randn(tensor.shape, generator=generator, device=generator.device, dtype=torch.float32)
            tensor.copy_(1 + 0.1 * drawn if tensor.dim() == 1 else 0.05 * drawn)
    if train:
        wrap_for_training(model, config)
    engine = Engine(model, temperature=1.0)
    if train:
        engine.set_optimizer(*build_optimizer(config, model, 1000))
    return config, engine


def packs_of(engine: Engine, tokens: int, sequence: int) -> list[Any]:
    """One pack of `tokens` rows in sequences of `sequence` rows, all of them response
    tokens, advantages of both signs.
    """
    from megarl.engine.batch import make_packs

    parallel = engine.model.parallel
    generator = torch.Generator().manual_seed(1)
    vocabulary, count = engine.model.weight_map.vocab_size, max(1, tokens // sequence)
    drawn = [torch.randint(vocabulary, (min(sequence, tokens) + 1,), generator=generator) for _ in range(count)]
    [pack] = make_packs([list(range(count))], drawn, [1] * count, parallel.layout, parallel.coord)
    pack.rollout.advantages = torch.where(pack.seq_ids % 2 == 0, 1.0, -1.0)
    pack.rollout.logprobs = torch.full_like(pack.rollout.logprobs, -float(torch.tensor(float(vocabulary)).log()))
    pack.rollout.group_ids, pack.rollout.denominators = (
        pack.seq_ids // 2,
        torch.full_like(pack.rollout.denominators, float(count)),
    )
    return [pack]


def describe_profile(engine: Engine) -> dict[str, Any]:
    profile = engine.model.profile
    return {"layers": profile.layers, "attention": profile.attention, "experts": profile.experts, "adam": profile.adam}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, in float64 on the CPU."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).norm() / expected.norm())
