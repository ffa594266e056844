"""One batch of rollouts into optimizer steps: the pi_old pass, the N updates, and their metrics (docs/objective.md)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.config import Config
from megarl.engine.batch import Pack
from megarl.engine.build import Engine, route_shape
from megarl.engine.reference import Reference
from megarl.engine.step import Routes
from megarl.errors import UserError
from megarl.loop.collect import Batch, Values
from megarl.loop.critic_step import Valuation, explained
from megarl.loop.reduce import Times, merge_all, reduce_sums, routing_values
from megarl.objective import Sums, finish, merge, mismatch_metrics, policy_loss
from megarl.observe.trace import phase
from megarl.observe.worst import Row, gather_worst, worst_of
from megarl.replay.metrics import RoutingSums


class Learner:
    """Holds what the passes of one step share: which routes each pass uses, and where metrics are collected.

    Made before a checkpoint is loaded: the reference is the policy as it is now.
    """

    def __init__(self, config: Config, engine: Engine) -> None:
        self.config, self.engine, self.parallel = config, engine, engine.model.parallel
        self.mode = config.replay_mode
        self.moe_layers = len(engine.model.weight_map.moe_layers)
        self.columns = list(route_shape(engine.model).layers_of_stage[self.parallel.coord.pp])
        self.worst: list[Row] = []  # rank 0: the tokens of the last batch on which the engines differ most
        self.valuation = Valuation(config, engine) if config.objective.advantage == "gae" else None
        self.critic_norm: dict[str, float] = {}
        self.reference = Reference(engine.model) if config.objective.kl_coef else None
        self._step, self._names = 0, [""]
        self.live: Routes = "record" if config.replay.metrics and self.moe_layers else "off"

    @property
    def critic(self) -> Engine | None:
        return self.valuation.critic if self.valuation else None

    def learn(self, batch: Batch, step: int) -> tuple[Values, int]:
        """pi_old once for the whole batch, then one optimizer step a
        mini-batch; (metrics, optimizer steps of the policy) on every rank.

        step: rollout steps done before this one. A batch without mini-batches has nothing to learn from.
        """
        times = Times()
        self._step, self._names = step + 1, batch.names
        minibatches = batch.minibatches
        packs = [pack for minibatch in minibatches for pack in minibatch]
        old_routing, new_routing = (RoutingSums(self.moe_layers, self.columns) for _ in range(2))
        warming = self.valuation is not None and step < self.config.critic.warmup_steps
        # With one mini-batch the weights do not move before its only update, whose own log-probability is pi_old: no
        # pass of its own.
        separate = len(minibatches) > 1 or (warming and bool(packs))
        if separate:
            with phase("old_logprob"):
                self._old_pass(packs, old_routing)
        times.lap("time/old_logprob_s")
        self._judge(packs, times)
        sound = self._sound(self._first_bad(packs))
        sums: Sums = {}
        norms: list[dict[str, float]] = []
        for minibatch in minibatches if sound else []:
            if self.valuation:
                with phase("critic_update"):
                    sums = merge_all(sums, self._critic_update(minibatch))
            if warming:
                continue
            with phase("update"):
                parts, norm = self._policy_update(minibatch, separate)
            sums, norms = merge_all(sums, parts), norms + norm
            for pack in minibatch:
                self._after_update(pack, old_routing, new_routing, separate)
        for pack in packs:
            if self.parallel.is_last_stage and pack.old_logprobs is not None:
                cap = self.config.objective.is_cap
                sums = merge(sums, mismatch_metrics(pack.old_logprobs.cpu(), pack.rollout_logprobs, pack.mask, cap))
        times.lap("time/update_s")
        values: Values = dict(explained(finish(reduce_sums(self.parallel, sums))))
        if self.config.run.rollout_samples:
            at = self.parallel
            self.worst = gather_worst(worst_of(packs) if at.is_last_stage and at.coord.tp == at.coord.cp == 0 else [])
        if packs and (self.live != "off" or self.mode != "none"):
            values |= routing_values(self.parallel, old_routing, new_routing)
        if norms:
            values |= {
                "optim/grad_norm": max(norm["optim/grad_norm"] for norm in norms),
                "optim/lr": norms[-1]["optim/lr"],
            }
        values |= {key.replace("optim", "critic"): value for key, value in self.critic_norm.items()}
        values["batch/skipped_updates"] = float(0 if warming else len(minibatches) - len(norms))
        return values | times.seconds, len(norms)

    def _old_pass(self, packs: list[Pack], routing: RoutingSums) -> None:
        results = self.engine.logprobs(
            packs, "replay" if self.mode == "R3" else "record" if self.mode == "R2" else self.live
        )
        for pack, (logprobs, _) in zip(packs, results):
            pack.old_logprobs = logprobs
        for pack in packs:
            self._compare_with_rollout(pack, routing)
            pack.own_old = pack.own
            if self.mode == "R2":
                pack.routes, pack.present = pack.own, None

    def _judge(self, packs: list[Pack], times: Times) -> None:
        """What the objective needs beside the policy's own log-probabilities: the
        reference's, and the critic's values.
        """
        if self.reference and packs:
            with phase("reference"), self.reference.swapped_in():
                for pack, (logprobs, _) in zip(packs, self.engine.logprobs(packs, "off")):
                    pack.ref_logprobs = logprobs
            times.lap("time/reference_s")
        if self.valuation and packs:
            with phase("values"):
                self.valuation.judge(packs)
            times.lap("time/values_s")

    def _policy_update(self, minibatch: list[Pack], separate: bool) -> tuple[list[Sums], list[dict[str, float]]]:
        """(metrics of the packs, what the optimizer step says: nothing where it was skipped)."""
        parts = self.engine.gradients(minibatch, self._update_routes(separate), self._loss)
        fault = (
            ""
            if self.engine.finite_gradients()
            else self._first_bad(minibatch) or "the gradient of an update is not finite"
        )
        return parts, [self.engine.step()] if self._sound(fault) else []

    def _critic_update(self, minibatch: list[Pack]) -> list[Sums]:
        assert self.valuation is not None
        parts = self.valuation.gradients(minibatch)
        if self._sound("" if self.valuation.critic.finite_gradients() else "the critic's gradient is not finite"):
            self.critic_norm = self.valuation.critic.step()
        return parts

    def _first_bad(self, packs: list[Pack]) -> str:
        """The first response on this rank with a NaN or infinite number
        that the loss would take, named; "" if there is none.
        """
        for pack in packs:
            rows = pack.mask.bool()
            for what in ("logprobs", "old_logprobs", "ref_logprobs", "old_values"):
                found: Tensor | None = getattr(pack, what)
                bad = (~found.cpu().isfinite() & rows).nonzero().flatten() if found is not None else rows[:0].nonzero()
                if len(bad):
                    response = pack.responses[int(pack.seq_ids[bad[0]])]
                    return f"{what} of {self._names[response]} hold {float(found[bad[0]])}"  # type: ignore[index]
        return ""

    def _sound(self, fault: str) -> bool:
        """Whether no rank has a fault (fault: this rank's, or "").
        Under train.on_bad_batch stop all ranks raise the first one.
        """
        flag = torch.tensor(float(bool(fault)), device=self.parallel.device.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not flag:
            return True
        everyone = [""] * self.parallel.layout.world
        dist.all_gather_object(everyone, fault)
        first = next(filter(None, everyone))
        if self.config.train.on_bad_batch == "stop":
            raise UserError(
                f"step {self._step}: {first}; find the cause (train.lr?), or leave such updates out by "
                "train.on_bad_batch=skip"
            )
        if self.parallel.is_main:
            print(f"step {self._step}: an update was skipped: {first}", flush=True)
        return False

    def _update_routes(self, separate: bool) -> Routes:
        """R2 replays what the pi_old pass recorded; without that pass
        its replay would be of the very routes the update takes.
        """
        return "replay" if self.mode == "R3" or (self.mode == "R2" and separate) else self.live

    def _loss(self, pack: Pack, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Sums]:
        if pack.old_logprobs is None:
            pack.old_logprobs = logprobs.detach()
        pack.logprobs = logprobs.detach()
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
            ref_logprobs=pack.ref_logprobs,
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
