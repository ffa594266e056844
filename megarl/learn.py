"""One batch of rollouts into optimizer steps: the pi_old pass, the N updates, and their metrics (spec/objective.md)."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.config import Config
from megarl.engine.batch import Pack
from megarl.engine.build import Engine, route_shape
from megarl.engine.step import Routes
from megarl.objective import Sums, finish, merge, mismatch_metrics, policy_loss
from megarl.replay.metrics import RoutingSums
from megarl.report.trace import phase
from megarl.report.worst import Row, gather_worst, worst_of

Values = dict[str, float | list[float]]


class Learner:
    """Holds what the passes of one step share: which routes each pass uses, and where metrics are collected."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self.config, self.engine, self.parallel = config, engine, engine.model.parallel
        self.mode = config.replay_mode
        self.moe_layers = len(engine.model.weight_map.moe_layers)
        self.columns = list(route_shape(engine.model).layers_of_stage[self.parallel.coord.pp])
        self.worst: list[Row] = []  # rank 0: the tokens of the last batch on which the engines differ most
        self.live: Routes = "record" if config.replay.metrics and self.moe_layers else "off"

    def learn(self, minibatches: list[list[Pack]]) -> Values:
        """pi_old once for the whole batch, then one optimizer step a mini-batch. Every rank gets the metrics."""
        start = time.perf_counter()
        packs = [pack for minibatch in minibatches for pack in minibatch]
        old_routing, new_routing = (RoutingSums(self.moe_layers, self.columns) for _ in range(2))
        # With one mini-batch the weights do not move before its only update, whose own log-probability is pi_old: no pass of its own.
        separate = len(minibatches) > 1
        if separate:
            with phase("old_logprob"):
                self._old_pass(packs, old_routing)
        middle = time.perf_counter()
        sums: Sums = {}
        norms: list[dict[str, float]] = []
        for minibatch in minibatches:
            with phase("update"):
                metrics, norm = self.engine.update(minibatch, self._update_routes(separate), self._loss)
            norms.append(norm)
            for part in metrics:
                sums = merge(sums, part)
            for pack in minibatch:
                self._after_update(pack, old_routing, new_routing, separate)
        for pack in packs:
            if self.parallel.is_last_stage and pack.old_logprobs is not None:
                cap = self.config.objective.is_cap
                sums = merge(sums, mismatch_metrics(pack.old_logprobs.cpu(), pack.rollout_logprobs, pack.mask, cap))
        values: Values = dict(finish(self._reduce(sums)))
        if self.config.run.rollout_samples:
            at = self.parallel
            self.worst = gather_worst(worst_of(packs) if at.is_last_stage and at.coord.tp == at.coord.cp == 0 else [])
        values |= self._routing(old_routing, new_routing)
        values["optim/grad_norm"] = max(norm["optim/grad_norm"] for norm in norms)
        values["optim/lr"] = norms[-1]["optim/lr"]
        values["time/old_logprob_s"] = middle - start
        values["time/update_s"] = time.perf_counter() - middle
        return values

    def _old_pass(self, packs: list[Pack], routing: RoutingSums) -> None:
        results = self.engine.logprobs(packs, "replay" if self.mode == "R3" else "record" if self.mode == "R2" else self.live)
        for pack, (logprobs, _) in zip(packs, results):
            pack.old_logprobs = logprobs
        for pack in packs:
            self._compare_with_rollout(pack, routing)
            pack.own_old = pack.own
            if self.mode == "R2":
                pack.routes, pack.present = pack.own, None

    def _update_routes(self, separate: bool) -> Routes:
        """R2 replays what the pi_old pass recorded; without that pass its replay would be of the very routes the update takes."""
        return "replay" if self.mode == "R3" or (self.mode == "R2" and separate) else self.live

    def _loss(self, pack: Pack, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Sums]:
        if pack.old_logprobs is None:
            pack.old_logprobs = logprobs.detach()
        device = logprobs.device
        return policy_loss(
            logprobs,
            pack.old_logprobs,
            pack.rollout_logprobs.to(device),
            pack.advantages.to(device),
            pack.mask.to(device),
            pack.seq_ids.to(device),
            self.config.objective,
            group_ids=pack.group_ids.to(device),
            entropy=entropy,
            denominator=pack.denominators.to(device),
        )

    def _after_update(self, pack: Pack, old: RoutingSums, new: RoutingSums, separate: bool) -> None:
        if not separate:
            self._compare_with_rollout(pack, old)
            pack.own_old = pack.own
        if pack.own is not None and pack.own_old is not None:
            new.add(pack.own, pack.own_old, self.engine.predicting_rows(pack))

    def _compare_with_rollout(self, pack: Pack, routing: RoutingSums) -> None:
        if pack.own is not None and pack.routes is not None and pack.present is not None:
            rows = self.engine.predicting_rows(pack) & pack.present
            routing.add(pack.own, pack.routes, rows, pack.gap)

    def _reduce(self, sums: Sums) -> Sums:
        """Adds (or maxes) over the data-parallel ranks of the last stage, then tells everyone."""
        at = self.parallel
        if at.coord.cp:  # every context-parallel rank computed the same loss
            sums = {key: value if key.endswith(":max") else torch.zeros_like(value) for key, value in sums.items()}
        if at.is_last_stage and at.layout.dp * at.layout.cp > 1:
            for op, keys in _by_operation(sums):
                joined = torch.stack([sums[key].double().to(at.device.device) for key in keys])
                dist.all_reduce(joined, op=op, group=at.replica_group)
                sums |= dict(zip(keys, joined))
        told = [sums]
        if at.layout.pp > 1:
            dist.broadcast_object_list(told, src=at.layout.rank_of(tp=0, cp=0, dp=0, pp=at.layout.pp - 1))
        return told[0]

    def _routing(self, old: RoutingSums, new: RoutingSums) -> Values:
        """routing/* over all ranks: every rank's routers saw other rows or other layers."""
        if self.live == "off" and self.mode == "none":
            return {}
        device = self.parallel.device.device
        differs = (torch.cat(old.differs).double() if old.differs else torch.zeros(0, dtype=torch.float64)).to(device)
        if self.parallel.layout.pp > 1:  # the stages hold different layers of the same rows
            dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=self.parallel.pp_group)
        differing = torch.tensor([float(differs.sum()), float(len(differs))], dtype=torch.float64)
        sums = torch.cat([old.agree, old.rows, new.agree, new.rows, differing]).to(device)
        worst = torch.tensor(old.worst_gap, dtype=torch.float64, device=device)
        if self.parallel.layout.world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        agree, rows, agree_new, rows_new, pair = sums.split([self.moe_layers] * 4 + [2])
        values: Values = {}
        if rows.sum():
            values["routing/agree_rollout_old"] = float(agree.sum() / rows.sum())
            values["routing/layer_agreement"] = (agree / rows.clamp(min=1)).tolist()
            values["routing/any_layer_differs_frac"] = float(pair[0] / pair[1].clamp(min=1))
            values["routing/worst_gap"] = float(worst)
        if rows_new.sum():
            values["routing/agree_old_current"] = float(agree_new.sum() / rows_new.sum())
        return values


def _by_operation(sums: Sums) -> list[tuple[dist.ReduceOp.RedOpType, list[str]]]:
    keys = sorted(sums)
    maxima = [key for key in keys if key.endswith(":max")]
    return [(dist.ReduceOp.MAX, maxima), (dist.ReduceOp.SUM, [key for key in keys if key not in maxima])]
