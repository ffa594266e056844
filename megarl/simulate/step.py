"""One rank of N takes a step: the engine is built, its optimizer has been through a step, and a batch of two
mini-batches is learnt from, with a pi_old pass and with all that the objective asks for: a critic, a reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megarl.config import Config
from megarl.engine import critic as critics
from megarl.engine.batch import Pack, make_packs, router_rows
from megarl.engine.build import Engine, route_shape
from megarl.engine.device import setup_device
from megarl.engine.model import build_model, wrap_for_training
from megarl.engine.optim import build_optimizer
from megarl.engine.parallel import destroy_parallel, init_parallel
from megarl.loop.batch import Batch, Span
from megarl.loop.learn import Learner
from megarl.simulate.cuda import simulated
from megarl.simulate.ledger import Ledger
from megarl.weights.map.weight_map import WeightMap, load_hf_config

MINIBATCHES = 2  # more than one, so that there is a pi_old pass


@dataclass(frozen=True)
class Simulated:
    """What a rank recorded. packs: of one mini-batch. seconds, cpu_seconds: that the simulation took."""

    rank: int
    world: int
    packs: int
    minibatches: int
    moe_layers: int  # of this rank
    ledger: Ledger
    seconds: float
    cpu_seconds: float


def simulate(
    config: Config, world: int, rank: int, packs: int | None = None, minibatches: int = MINIBATCHES
) -> Simulated:
    """Rank `rank` of `world`. packs: of each mini-batch; None takes as many as the pipeline holds at once. One
    mini-batch has no pi_old pass.

    The engine computes in bfloat16 unless engine.dtype says otherwise, with the layers that are installed here.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    count = packs or config.parallel.pp
    with simulated() as device, alone(world, rank):
        ledger: Ledger = device.ledger
        engine = built(config, ledger, load_hf_config(config.model.path))
        ledger.phase = "packs"
        batches = [packs_of(config, engine, count) for _ in range(minibatches)]
        responses = [f"response {i}" for i in range(1 + max((r for p in batches[0] for r in p.responses), default=0))]
        spans = [_spans(config, i) for i in range(len(responses))]
        learner = learner_of(config, engine, ledger)
        ledger.phase = "metrics"
        learner.learn(Batch(batches, responses, {}, [], [], spans), config.critic.warmup_steps)
        ledger.phase = "end"
        layers = len(engine.model.routers())
    return Simulated(
        rank, world, count, minibatches, layers, ledger, time.perf_counter() - start, time.process_time() - cpu_start
    )


@contextmanager
def alone(world: int, rank: int) -> Iterator[None]:
    """A process group in which the other ranks do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        destroy_parallel()


def built(config: Config, ledger: Ledger, hf: dict[str, Any]) -> Engine:
    """build_engine of a model of this config.json, without reading weights."""
    parallel = init_parallel(config.parallel, setup_device(), config.run.seed)
    ledger.phase = "model"
    model = build_model(config, WeightMap(hf), parallel)
    ledger.phase = "gradient buffers"
    wrap_for_training(model, config)
    engine = Engine(model, config.rollout.temperature)
    ledger.phase = "optimizer"
    engine.set_optimizer(*build_optimizer(config, model, config.optimizer_steps))
    engine.step()  # Adam's moments come with the first one
    _name_phases(engine, ledger, logprobs="pi_old pass", gradients="gradients", step="optimizer step")
    return engine


def learner_of(config: Config, engine: Engine, ledger: Ledger) -> Learner:
    """With the critic and the reference that the objective asks for; the critic's weights are not read either."""
    ledger.phase = "critic"
    critics.load_weights = lambda *args, **kwargs: None
    learner = Learner(config, engine)
    if learner.critic:
        learner.critic.step()
        _name_phases(learner.critic, ledger, values="values", gradients="critic gradients", step="critic step")
    return learner


def _name_phases(engine: Engine, ledger: Ledger, **phases: str) -> None:
    for name, phase in phases.items():
        setattr(engine, name, _in_phase(ledger, phase, getattr(engine, name)))


def _in_phase(ledger: Ledger, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with ledger.during(phase):
            return call(*args, **kwargs)

    return inside


def packs_of(config: Config, engine: Engine, count: int) -> list[Pack]:
    """Full packs, of responses as long as the longest may be and a shorter one for the rest, with everything that
    rollouts bring.
    """
    model, tokens = engine.model, config.engine.micro_batch_tokens
    at, weight_map = model.parallel, model.weight_map
    rows = min(tokens, config.rollout.max_new_tokens + config.rollout.max_prompt_tokens)
    lengths = [rows] * (tokens // rows) + [tokens % rows] * (tokens % rows > 0)
    drawn = [torch.randint(weight_map.vocab_size, (length + 1,)) for _ in range(count) for length in lengths]
    assigned = [list(range(i * len(lengths), (i + 1) * len(lengths))) for i in range(count)]
    packs = make_packs(assigned, drawn, [1] * len(drawn), at.layout, at.coord)
    layers = len(route_shape(model).layers_of_stage[at.coord.pp])
    for pack in packs:
        given = pack.rollout
        given.logprobs = torch.full_like(given.logprobs, -1.0)
        given.rewards = torch.where(pack.seq_ids % 2 == 0, 1.0, 0.0)
        given.advantages = torch.where(pack.seq_ids % 2 == 0, 1.0, -1.0)
        given.group_ids, given.denominators = pack.seq_ids // 2, torch.full_like(given.denominators, float(len(drawn)))
        if layers and weight_map.num_experts:
            own = len(router_rows(pack.padded, at.layout, at.coord))
            given.routes = _even_routes(own, layers, weight_map.top_k, weight_map.num_experts)
            given.has_route = torch.ones(own, dtype=torch.bool)
    return packs


def _spans(config: Config, response: int) -> list[Span]:
    """Its first half of weights as old as rollout.max_lag allows, in turn, its second half of those of now."""
    lag, rows = response % (config.rollout.max_lag + 1), config.rollout.max_new_tokens
    return [Span(lag, 0, rows // 2, False), Span(0, rows // 2, rows, lag > 0)]


def _even_routes(rows: int, layers: int, topk: int, experts: int) -> torch.Tensor:
    """int16 [rows, layers, topk]: every expert equally often."""
    ids = (torch.arange(rows * topk) % experts).view(rows, 1, topk).sort(2).values
    return ids.expand(rows, layers, topk).to(torch.int16).contiguous()
