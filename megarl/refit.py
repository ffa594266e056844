"""Weights from the trainer into the rollout workers, and proof that both engines now compute the same: sync, then canary."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.distributed as dist

from megarl.collect import Values
from megarl.config import Config
from megarl.engine.batch import make_packs
from megarl.engine.build import Engine, route_shape
from megarl.engine.exchange import attach_routes
from megarl.errors import UserError
from megarl.replay.routes import only_moe_layers
from megarl.report.trace import phase
from megarl.rollout.fleet import Fleet
from megarl.weights.gather import gather_full, plan_gather
from megarl.weights.quantize import quantized_weights

CANARY_TOKENS = 64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5}  # of |log-probability difference|, by the coarser of the two engines


class Refit:
    """Every rank calls sync(); rank 0 sends, and asks the servers for the canary."""

    def __init__(self, config: Config, engine: Engine, fleet: Fleet) -> None:
        self.config, self.engine, self.fleet = config, engine, fleet
        model = engine.model
        self.plan = plan_gather(model.weight_map, model.parallel.layout)
        self.routes = route_shape(model) if config.wants_routes and model.weight_map.moe_layers else None
        generator = torch.Generator().manual_seed(0)
        self.canary = torch.randint(model.weight_map.hf["vocab_size"], (CANARY_TOKENS,), generator=generator)
        device = model.parallel.device
        trained = device.dtype(config.engine.dtype)
        self.rollout_dtype = trained if config.rollout.dtype == "auto" else device.dtype(config.rollout.dtype)
        coarse = torch.bfloat16 if torch.bfloat16 in (trained, self.rollout_dtype) else torch.float32
        self.tolerance = config.sync.canary_tolerance or TOLERANCE[coarse]

    def sync(self, version: int) -> Values:
        """Full tensors to every worker, checksums checked there, version set, prefix caches dropped; then the canary.

        Under sync.quantize both see the same quantised weights: the trainer's own are swapped out meanwhile.
        """
        start = time.perf_counter()
        model, how = self.engine.model, self.config.sync
        at, shapes = model.parallel, model.weight_map.hf_shapes
        with quantized_weights(model.params(), shapes, how.quantize, how.quantize_also, at.tp_group, at.etp_group):
            with phase("sync"):
                values = self._push(version)
            with phase("canary"):
                values["sync/canary_max_diff"] = self._canary()
        values["time/sync_s"] = time.perf_counter() - start
        values["version/weights"] = float(version)
        return values

    def _push(self, version: int) -> Values:
        model = self.engine.model
        tensors = gather_full(self.plan, model.weight_map, model.params(), model.parallel.coord.rank, self.rollout_dtype)
        values: Values = {}
        if model.parallel.is_main:
            report = self.fleet.push(tensors, version)
            values["sync/bytes"] = float(report.bytes)
        else:
            for _ in tensors:
                pass
        return values

    def _canary(self) -> float:
        """Largest |log pi - log mu| over the canary, over all servers. Raises where it exceeds the tolerance."""
        model, at = self.engine.model, self.engine.model.parallel
        answers: list[list[tuple[np.ndarray, np.ndarray | None]]] = [self.fleet.score(self.canary.tolist()) if at.is_main else []]
        dist.broadcast_object_list(answers, src=0)
        worst = torch.zeros(len(answers[0]), dtype=torch.float64, device=at.device.device)
        for server, (logprobs, routes) in enumerate(answers[0]):
            (pack,) = make_packs([[0]], [self.canary], [1], at.layout, at.coord)
            if routes is not None and self.routes is not None:
                routes = only_moe_layers(routes, model.weight_map.moe_layers, model.weight_map.num_layers)
                attach_routes(pack, torch.from_numpy(routes.astype(np.int16)), at, self.routes)
            packs = [pack] * (at.layout.pp if at.layout.vpp > 1 else 1)
            scored = self.engine.logprobs(packs, "off" if pack.routes is None else "replay", temperature=1.0)
            if scored:
                ours = scored[0][0][: CANARY_TOKENS - 1].cpu()
                worst[server] = (ours - torch.from_numpy(logprobs.copy())).abs().max()
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if not worst.max() <= self.tolerance:  # not (a <= b): NaN fails too
            server = int(worst.argmax())
            raise UserError(
                f"weight sync: the canary differs by {float(worst[server]):.3g} (limit {self.tolerance:g}) between the trainer and "
                f"{self.fleet.urls[server]}; the worker did not load what was sent (a coarser rollout.dtype needs sync.canary_tolerance)"
            )
        return float(worst.max())
