"""From a config to an engine that is ready to score or to train, on every rank."""

from __future__ import annotations

from megarl.announce import announce
from megarl.config import Config
from megarl.engine.device import make_deterministic, setup_device
from megarl.engine.exchange import RouteShape
from megarl.engine.model import Model, build_model, load_weights, wrap_for_training
from megarl.engine.optim import build_optimizer
from megarl.engine.parallel import Parallel, group_timeout, init_parallel
from megarl.engine.step import Engine
from megarl.weights.map.weight_map import WeightMap, load_hf_config


def join_ranks(config: Config) -> Parallel:
    """Device and process groups. Collective."""
    device = setup_device()
    announce(f"computing on {device.describe()}, in {str(device.dtype(config.engine.dtype)).removeprefix('torch.')}")
    if config.engine.deterministic:
        make_deterministic()
    return init_parallel(config.parallel, device, config.run.seed, group_timeout(config))


def build_engine(
    config: Config, parallel: Parallel | None = None, *, optimizer_steps: int = 0, temperature: float = 1.0
) -> Engine:
    """Model filled from model.path, and, with optimizer_steps > 0, gradient buffers, optimizer and schedule.

    parallel: of join_ranks(), which is called here where it was not.
    """
    parallel = parallel or join_ranks(config)
    weight_map = WeightMap(load_hf_config(config.model.path))
    model = build_model(config, weight_map, parallel)
    load_weights(model, config.model.path)
    if optimizer_steps:
        wrap_for_training(model, config)
    engine = Engine(model, temperature)
    if optimizer_steps:
        engine.set_optimizer(*build_optimizer(config, model, optimizer_steps))
    return engine


def route_shape(model: Model) -> RouteShape:
    """What the exchange must know to send each rank its own layers' routes, in the rank's order (chunk by chunk)."""
    layout, order = model.parallel.layout, {layer: i for i, layer in enumerate(model.weight_map.moe_layers)}
    stages = tuple(
        tuple(
            order[x]
            for chunk in range(layout.vpp)
            for x in layout.stage_layers(model.weight_map.num_layers, pp, chunk)
            if x in order
        )
        for pp in range(layout.pp)
    )
    return RouteShape(stages, model.weight_map.num_experts, model.weight_map.top_k)


__all__ = ["Engine", "Parallel", "build_engine", "join_ranks", "route_shape"]
