"""One batch of rollouts into optimizer steps: the pi_old pass, the N updates, and their metrics (docs/objective.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from megarl.config import Config
from megarl.engine.batch import Pack
from megarl.engine.build import Engine, route_shape
from megarl.engine.device import to_device, to_host
from megarl.engine.reference import Reference
from megarl.engine.step import Routes
from megarl.errors import UserError
from megarl.loop.batch import Batch
from megarl.loop.by_lag import by_lag
from megarl.loop.critic_step import CriticStep, explained
from megarl.loop.guard import MismatchGuard
from megarl.loop.reduce import Times, Values, merge_all, reduce_sums, rollout_routing, update_routing
from megarl.objective import Sums, finish, merge, mismatch_metrics, policy_loss
from megarl.objective.metrics import mean
from megarl.observe.trace import enter, phase
from megarl.observe.worst import TokenNotes, gather_notes, take_notes
from megarl.replay.metrics import RoutingSums
from megarl.rollout.patience import reading_s


@dataclass(frozen=True)
class Learned:
    """metrics: on every rank. optimizer_steps: those of the policy; fewer than mini-batches where some were skipped.

    notes: on rank 0 what is kept of single tokens; nothing elsewhere. guarded: why the batch was not trained on though
    its numbers are sound: its mismatch is out of line, or it is of other weights; "" else.
    """

    metrics: Values
    optimizer_steps: int
    notes: TokenNotes
    guarded: str = ""


@dataclass(frozen=True)
class _Update:
    """packs: the metrics of each pack, on the last stage. optimizer: what the step says; None where it was skipped."""

    packs: list[Sums]
    optimizer: dict[str, float] | None


class _Routing:
    """Agreement of the routes of one batch. old: the rollout's with pi_old's; new: pi_old's with pi_theta's."""

    def __init__(self, moe_layers: int, columns: list[int]) -> None:
        self.old, self.new = RoutingSums(moe_layers, columns), RoutingSums(moe_layers, columns)

    def add_old(self, pack: Pack, rows: Tensor) -> None:
        """After the pass that gives pi_old: its live routes against the rollout's. rows: bool, those that count."""
        passes, rollout = pack.passes, pack.rollout
        passes.old_routes = passes.live_routes
        if passes.live_routes is not None and rollout.routes is not None and rollout.has_route is not None:
            self.old.add(passes.live_routes, rollout.routes, rows & rollout.has_route, passes.score_gap)

    def add_new(self, pack: Pack, rows: Tensor) -> None:
        """After an update: its live routes against those of pi_old."""
        if pack.passes.live_routes is not None and pack.passes.old_routes is not None:
            self.new.add(pack.passes.live_routes, pack.passes.old_routes, rows)


class Learner:
    """Holds what the passes of one step share: which routes each pass uses, and where metrics are collected.

    Made before a checkpoint is loaded: the reference is the policy as it is now.
    """

    def __init__(self, config: Config, engine: Engine) -> None:
        self.config, self.engine, self.parallel = config, engine, engine.model.parallel
        self.replay_mode = config.replay_mode if engine.model.weight_map.moe_layers else "none"
        self.moe_layers = len(engine.model.weight_map.moe_layers)
        self.columns = list(route_shape(engine.model).layers_of_stage[self.parallel.coord.pp])
        enter("the load of reference and critic", 2 * reading_s(Path(config.model.path)))
        self.critic_step = CriticStep(config, engine) if config.objective.advantage == "gae" else None
        self.critic_norm: dict[str, float] = {}
        self.reference = Reference(engine.model) if config.objective.kl_coef else None
        self.unreplayed: Routes = "record" if config.replay.metrics and self.moe_layers else "off"
        engines = [part.model_dump_json() for part in (config.engine, config.parallel, config.rollout, config.replay)]
        of = xxhash.xxh3_64_hexdigest("".join(engines).encode())
        self.guard = MismatchGuard(config.train.mismatch_guard, config.rollout.max_lag > 0, of)
        self._step, self._names, self._guarded = 0, [""], ""
        self._judged: Values | None = None  # what the guard has measured of this batch
        self._before_step: Callable[[], None] = lambda: None

    @property
    def critic(self) -> Engine | None:
        return self.critic_step.critic if self.critic_step else None

    def learn(self, batch: Batch, step: int, before_step: Callable[[], None] = lambda: None) -> Learned:
        """pi_old once for the whole batch, then one optimizer step a mini-batch. Collective.

        step: rollout steps done before this one; before_step: called on every rank before each optimizer step, with the
        weights as they were before the first one. A batch without mini-batches has nothing to learn from.
        """
        times = Times()

        def wait() -> None:
            with times.aside("time/canary_s"):
                before_step()

        self._before_step = wait
        self.critic_norm, self._judged = {}, None  # a step without an update of the critic has none
        self._step, self._names, self._guarded = step + 1, batch.names, batch.foreign
        packs = [pack for minibatch in batch.minibatches for pack in minibatch]
        routing = _Routing(self.moe_layers, self.columns)
        warming = self.critic_step is not None and step < self.config.critic.warmup_steps
        # With one mini-batch the weights do not move before its only update, whose own log-probability is pi_old: no
        # pass of its own.
        has_old_pass = len(batch.minibatches) > 1 or (warming and bool(packs))
        if has_old_pass:
            with phase("old_logprob"):
                self._old_pass(packs, routing)
        times.lap("time/old_logprob_s")
        self._reference_and_values(packs, times)
        computed = has_old_pass or self.reference is not None or self.critic_step is not None
        sound = not computed or self._sound(self._first_bad(packs))
        sound = sound and not (has_old_pass and self._out_of_line(packs, routing))
        sums: Sums = {}
        optimizer_steps: list[dict[str, float]] = []
        for minibatch in batch.minibatches if sound else []:
            if not warming:  # before the critic: without an old pass the guard judges in here
                with phase("update"):
                    update = self._policy_update(minibatch, has_old_pass, routing)
                sums = merge_all(sums, update.packs)
                if update.optimizer is not None:
                    optimizer_steps.append(update.optimizer)
                for pack in minibatch:
                    routing.add_new(pack, self.engine.predicting_rows(pack))
            if self.critic_step and not self._guarded:
                with phase("critic_update"):
                    sums = merge_all(sums, self._critic_update(minibatch))
        judged = self._judged
        if judged is None:
            sums = merge(sums, self._mismatch(packs))
        times.lap("time/update_s")
        values: Values = dict(explained(finish(reduce_sums(self.parallel, sums))))
        values |= judged or {}
        values |= by_lag(self.config, self.parallel, packs, batch.spans)
        if packs and (self.unreplayed != "off" or self.replay_mode != "none"):
            if judged is None or self.unreplayed == "off":
                values |= rollout_routing(self.parallel, routing.old)
            values |= update_routing(self.parallel, routing.new)
        if optimizer_steps:
            values["optim/grad_norm"] = max(optimizer["optim/grad_norm"] for optimizer in optimizer_steps)
            values["optim/lr"] = optimizer_steps[-1]["optim/lr"]
        values |= {key.replace("optim", "critic"): value for key, value in self.critic_norm.items()}
        values["batch/skipped_updates"] = float(0 if warming else len(batch.minibatches) - len(optimizer_steps))
        values["batch/guarded"] = float(bool(self._guarded))
        notes = self._notes(packs, batch.sampled)
        return Learned(values | times.seconds, len(optimizer_steps), notes, self._guarded)

    def _old_pass(self, packs: list[Pack], routing: _Routing) -> None:
        how: dict[str, Routes] = {"R3": "replay", "R2": "record", "none": self.unreplayed}
        scores = self.engine.logprobs(packs, how[self.replay_mode])
        if self.parallel.is_last_stage:
            for pack, score in zip(packs, scores, strict=True):
                pack.passes.old_logprobs = score.logprobs
        for pack in packs:
            routing.add_old(pack, self.engine.predicting_rows(pack))

    def _reference_and_values(self, packs: list[Pack], times: Times) -> None:
        """What the objective needs beside the policy's own log-probabilities."""
        if self.reference and packs:
            with phase("reference"), self.reference.swapped_in():
                scores = self.engine.logprobs(packs, "off")
                if self.parallel.is_last_stage:
                    for pack, score in zip(packs, scores, strict=True):
                        pack.passes.ref_logprobs = score.logprobs
            times.lap("time/reference_s")
        if self.critic_step and packs:
            with phase("values"):
                self.critic_step.value(packs)
            times.lap("time/values_s")

    def _policy_update(self, minibatch: list[Pack], has_old_pass: bool, routing: _Routing) -> _Update:
        # Without an old pass R2 would replay the very routes that the update takes.
        replays = self.replay_mode == "R3" or (self.replay_mode == "R2" and has_old_pass)
        how: Routes = self.unreplayed if not replays else "replay" if self.replay_mode == "R3" else "replay_old"
        share = 1 / (len(minibatch) * self.parallel.layout.dp)  # every replica has as many packs
        sums = self.engine.gradients(minibatch, how, partial(self._loss, share=share))
        fault = ""
        if not self.engine.finite_gradients():
            fault = self._first_bad(minibatch) or "the norm of an update's gradient is not finite"
        if not has_old_pass:  # this update's own pass gave pi_old
            for pack in minibatch:
                routing.add_old(pack, self.engine.predicting_rows(pack))
        sound = self._sound(fault) and (has_old_pass or not self._out_of_line(minibatch, routing))
        if not sound:
            return _Update(sums, None)
        self._before_step()
        return _Update(sums, self.engine.step())

    def _critic_update(self, minibatch: list[Pack]) -> list[Sums]:
        assert self.critic_step is not None
        sums = self.critic_step.gradients(minibatch)
        if self._sound(
            "" if self.critic_step.critic.finite_gradients() else "the norm of the critic's gradient is not finite"
        ):
            self._before_step()
            self.critic_norm = self.critic_step.critic.step()
        return sums

    def _out_of_line(self, packs: list[Pack], routing: _Routing) -> bool:
        """Whether the mismatch of pi_old and mu on these packs leaves its band (train.mismatch_guard). They are all
        packs of the batch: what is measured here stands in its row. Collective.
        """
        if not self.guard.factor or not packs:
            return False
        values: Values = dict(finish(reduce_sums(self.parallel, self._mismatch(packs))))
        if self.unreplayed != "off":
            values |= rollout_routing(self.parallel, routing.old)
        self._judged = values
        k3, agreement = values.get("mismatch/kl_k3"), values.get("routing/agree_rollout_old")
        assert not isinstance(k3, list) and not isinstance(agreement, list)
        self._guarded = self.guard.judge(k3, agreement)
        if self._guarded and self.parallel.is_main:
            print(f"step {self._step}: no update: {self._guarded} (train.mismatch_guard)", flush=True)
        return bool(self._guarded)

    def _mismatch(self, packs: list[Pack]) -> Sums:
        """Of pi_old against mu, on the last stage."""
        sums: Sums = {}
        scored = [pack for pack in packs if self.parallel.is_last_stage and pack.passes.old_logprobs is not None]
        old_logprobs = to_host([pack.passes.old_logprobs for pack in scored])
        for pack, old in zip(scored, old_logprobs, strict=True):
            assert old is not None
            sums = merge(sums, mismatch_metrics(old, pack.rollout.logprobs, pack.mask, self.config.objective.is_cap))
        return sums

    def _notes(self, packs: list[Pack], sampled: list[int]) -> TokenNotes:
        if not self.config.run.rollout_samples:
            return TokenNotes()
        parallel = self.parallel
        speaks = parallel.is_last_stage and parallel.coord.tp == parallel.coord.cp == 0
        if speaks:  # the device has no more use for them
            for pack, old in zip(packs, to_host([pack.passes.old_logprobs for pack in packs]), strict=True):
                pack.passes.old_logprobs = old
        return gather_notes(take_notes(packs, sampled) if speaks else TokenNotes(), parallel.host_group)

    def _first_bad(self, packs: list[Pack]) -> str:
        """The first response on this rank with a NaN or infinite number that the loss would take, named; "" if there is
        none.
        """
        names = ("logprobs", "old_logprobs", "ref_logprobs", "old_values")
        taken = [(pack, what) for pack in packs for what in names if getattr(pack.passes, what) is not None]
        there = to_host([getattr(pack.passes, what) for pack, what in taken])
        for (pack, what), values in zip(taken, there, strict=True):
            assert values is not None
            bad = (~values.isfinite() & pack.mask.bool()).nonzero().flatten()
            if len(bad):
                response = pack.responses[int(pack.seq_ids[bad[0]])]
                return f"{what} of {self._names[response]} hold {float(values[bad[0]])}"
        return ""

    def _sound(self, fault: str) -> bool:
        """Whether no rank has a fault (fault: this rank's, or ""). Under train.on_bad_batch stop all ranks raise the
        first one.
        """
        flag = to_device(torch.tensor(float(bool(fault))), self.parallel.device.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not flag:
            return True
        faults = [""] * self.parallel.layout.world
        dist.all_gather_object(faults, fault, group=self.parallel.host_group)
        first = next(filter(None, faults))
        if self.config.train.on_bad_batch == "stop":
            self._before_step()  # where a server's canary differs, that is said: it may be the cause
            raise UserError(
                f"step {self._step}: {first}; find the cause (train.lr?), or leave such updates out by "
                "train.on_bad_batch=skip"
            )
        if self.parallel.is_main:
            print(f"step {self._step}: an update was skipped: {first}", flush=True)
        return False

    def _loss(self, pack: Pack, logprobs: Tensor, entropy: Tensor, *, share: float = 1.0) -> tuple[Tensor, Sums]:
        """share: what this pack counts for in loss/value; 1 makes it the sum over packs."""
        rollout, passes, device = pack.rollout, pack.passes, logprobs.device
        if passes.old_logprobs is None:
            passes.old_logprobs = logprobs.detach()
        passes.logprobs = logprobs.detach()
        loss, sums = policy_loss(
            logprobs,
            passes.old_logprobs,
            to_device(rollout.logprobs, device),
            to_device(rollout.advantages if passes.advantages is None else passes.advantages, device),
            to_device(pack.mask, device),
            to_device(pack.seq_ids, device),
            self.config.objective,
            group_ids=to_device(rollout.group_ids, device),
            ref_logprobs=passes.ref_logprobs,
            entropy=entropy,
            denominator=to_device(rollout.denominators, device),
        )
        # policy_loss divides its own by the groups of one call, but a group may lie in several packs
        return loss, sums | mean("loss/value", loss, share)
