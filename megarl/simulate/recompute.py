"""What engine.recompute saves and costs, traced: a model of one layer of each kind takes one pack, under each setting,
in the layout of one pipeline stage.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from megarl.config import Config
from megarl.engine.step import Engine
from megarl.estimate.memory import RECOMPUTE, one_of_each_kind
from megarl.simulate.cuda import simulated
from megarl.simulate.ledger import Ledger
from megarl.simulate.step import alone, built, packs_of
from megarl.weights.map.weight_map import WeightMap, load_hf_config


@dataclass
class Traced:
    """By engine.recompute. kept: bytes that a layer of a kind ("moe" or "dense") holds from its forward to its backward
    pass. forward: FLOPs of its forward pass. update: those of the whole forward and backward pass.
    """

    layers: dict[str, int] = field(default_factory=dict)
    kept: dict[str, dict[str, int]] = field(default_factory=dict)
    forward: dict[str, int] = field(default_factory=dict)
    update: dict[str, int] = field(default_factory=dict)


def trace_recompute(config: Config, world: int, rank: int) -> Traced:
    hf = load_hf_config(config.model.path)
    few = {**hf, "num_hidden_layers": one_of_each_kind(WeightMap(hf))}
    stage = {"pp": 1, "vpp": 1, "first_stage_layers": None, "last_stage_layers": None}
    ranks = world // config.parallel.pp
    traced = Traced()
    for setting in RECOMPUTE:
        one = config.changed(parallel=stage, engine={"recompute": setting})
        with simulated() as device, alone(ranks, rank % ranks):
            _trace(one, few, device.ledger, traced)
    return traced


def _trace(config: Config, hf: dict[str, Any], ledger: Ledger, traced: Traced) -> None:
    engine = built(config, ledger, hf)
    packs = packs_of(config, engine, 1)
    kept, flops = _watch(engine, ledger)
    engine.gradients(packs, "off", lambda pack, logprobs, entropy: (logprobs.sum(), {}))
    setting, moe = config.engine.recompute, set(engine.model.weight_map.moe_layers)
    kinds = {i: "moe" if i in moe else "dense" for i in kept}
    traced.kept[setting] = {kind: kept[i] for i, kind in kinds.items()}
    traced.update[setting] = ledger.flops["gradients"]
    if setting == "none":
        traced.forward = {kind: flops[i] for i, kind in kinds.items()}
        traced.layers = {kind: sum(kind == other for other in kinds.values()) for kind in kinds.values()}


def _watch(engine: Engine, ledger: Ledger) -> tuple[dict[int, int], dict[int, int]]:
    """(bytes that are more after a layer's first forward pass than before, FLOPs of it), by layer."""
    before: dict[int, tuple[int, int]] = {}
    kept: dict[int, int] = {}
    flops: dict[int, int] = defaultdict(int)

    def enter(i: int) -> Any:
        return lambda *_: before.setdefault(i, (ledger.live, sum(ledger.flops.values()))) and None

    def leave(i: int) -> Any:
        def hook(*_: Any) -> None:
            live, done = before[i]
            if i not in kept:
                kept[i], flops[i] = ledger.live - live, sum(ledger.flops.values()) - done

        return hook

    (chunk,) = engine.model.bare
    for i, layer in enumerate(chunk.decoder.layers):
        assert isinstance(layer, torch.nn.Module)
        layer.register_forward_pre_hook(enter(i))
        layer.register_forward_hook(leave(i))
    return kept, flops
