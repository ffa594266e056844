"""Weights from the trainer into the rollout workers, and proof that
both engines now compute the same: sync, then canary.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist

from megarl.announce import announce
from megarl.checkpoints import is_hf_folder
from megarl.config import Config
from megarl.engine.build import Engine, route_shape
from megarl.engine.export import export_hf
from megarl.launch.stop import StopRequest
from megarl.loop.canary import CanaryLimits, Spread, WrongCanary
from megarl.loop.own_score import OwnScore
from megarl.loop.reduce import Values
from megarl.observe.trace import enter, phase, waits
from megarl.rollout.fleet import Fleet, LeftOut, WorkersLost
from megarl.rollout.patience import ANSWER_S, STALE_S, reading_s
from megarl.rollout.registry import common_tp
from megarl.rollout.sync_leader import Canary, InFlight, Scoring, SyncSettings
from megarl.weights.reshard.outgoing import Slices, WholeTensors
from megarl.weights.reshard.quantize import quantized_weights
from megarl.weights.reshard.rollout_layout import RolloutLayout

CANARY_KEYS = ("sync/canary_median_diff", "sync/canary_tail_diff", "sync/canary_max_diff")  # in Spread's order
TRIES = 5  # of one sync, each without the workers that the one before has lost


class Refit:
    """Every rank calls sync(); rank 0 leads the servers, and asks them for the canary."""

    def __init__(self, config: Config, engine: Engine, fleet: Fleet) -> None:
        self.config, self.engine, self.fleet = config, engine, fleet
        model = engine.model
        routes = route_shape(model) if config.wants_routes and model.weight_map.moe_layers else None
        self.own = OwnScore(engine, routes, config.engine.micro_batch_tokens)
        self.canary: list[int] = self.own.tokens.tolist()
        device = model.parallel.device
        trained = device.dtype(config.engine.dtype)
        self.rollout_dtype = device.dtype(config.rollout_dtype(on_gpu=device.device.type == "cuda"))
        coarse = torch.bfloat16 if torch.bfloat16 in (trained, self.rollout_dtype) else torch.float32
        self.limits = CanaryLimits(config.sync.canary_tolerance, coarse)
        # Whether vLLM, loading model.path by itself, holds what the trainer would send at step 0. Of a Megatron
        # checkpoint it starts on dummy weights.
        from_disk = is_hf_folder(config.model.path)
        self.disk_is_step_0 = (
            from_disk and config.sync.quantize == "none" and trained in (torch.float32, self.rollout_dtype)
        )
        self.synced = False
        self._scoring: Scoring | None = None  # on every rank: of the last sync, whose canary is not compared yet
        self._canary_figures: Values = {}  # of the last canary that was compared
        # the last versions that were committed, as many as a response may have lived through
        self.committed: deque[int] = deque(maxlen=config.rollout.max_lag + 1)

    def ready(self, version: int, stop: StopRequest | None = None, ask_all: bool = True) -> None:
        """Before responses are asked for: who is lost is told, and where nobody is left, whoever comes gets the weights
        first. stop: what may end the wait for one. ask_all: also servers that have answered a moment ago. Collective.
        """
        self.fleet.check(ask_all)
        if not self.fleet.workers:
            scoring, self._scoring = self._scoring, None
            if scoring is not None:  # the next batch may have what they sampled
                with self._quantized():
                    self._compare_canary(scoring.answered())
            self.sync(version, stop)
            self.settle()

    def connect(self) -> None:
        """Brings trainers and the workers of the next sync together."""
        parallel, sync, workers = self.engine.model.parallel, self.config.sync, self.fleet.members
        weight_map, layout, rank = self.engine.model.weight_map, parallel.layout, parallel.coord.rank
        self.outgoing: Slices | WholeTensors
        if sync.transport == "reshard":
            rollout = RolloutLayout(len(workers), common_tp(workers))
            self.outgoing = Slices(weight_map, layout, rollout, self.rollout_dtype, rank)
        else:
            self.outgoing = WholeTensors(weight_map, layout, self.rollout_dtype, rank)
        staged = parallel.device.device.type == "cpu" if sync.staged is None else sync.staged
        remember = sync.digests != "off" and self.disk_is_step_0 and not self.synced
        colocated = self.config.launch.colocate
        settings = SyncSettings(sync.transport, self.outgoing.senders, staged, sync.timeout_s, colocated)
        self.fleet.connect(settings, self.outgoing.manifest_inputs, remember)

    def sync(self, version: int, stop: StopRequest | None = None) -> Values:
        """Weights into every worker, checked there; digests where due;
        the canary; and only then the version. Raises where one differs.

        Who is lost meanwhile is left out, as is a new worker by which it fails, and the sync done again as a whole,
        which also mends a worker that it had left half way. stop: what may end the wait for a worker, where none is
        left.
        Under sync.quantize all of these see the same quantised weights: the trainer's own are swapped out meanwhile.
        While requests are in flight the canary waits for its turn among them, and the trainers do not wait for it: see
        settle(). The figures of the canary are then those of the sync before.
        """
        start, tries = time.perf_counter(), 1
        while True:
            try:
                with waits(
                    self.config.sync.timeout_s + STALE_S + ANSWER_S
                ):  # a server that hangs, which is told by then
                    values = self._sync(version, stop)
                break
            except WorkersLost as lost:
                _tell_again(lost)
                if isinstance(lost, LeftOut):
                    continue  # as often as new workers come
                if tries == TRIES:
                    raise
                tries += 1
        self.synced = True
        values["time/sync_s"] = time.perf_counter() - start
        values["version/weights"] = float(version)
        return values

    def _sync(self, version: int, stop: StopRequest | None) -> Values:
        model, digests = self.engine.model, self.config.sync.digests

        def asked() -> int:
            enter("the wait for a rollout worker")  # which is no stall: it has a limit of its own
            return stop.asked if stop else 0

        in_flight = self._in_flight(version)
        changed = self.fleet.gather(asked, ask_all=in_flight is None or in_flight.how == "finish")
        if changed:
            self.connect()
        values: Values = {"sync/bytes": float(self.outgoing.bytes)}
        later = in_flight is not None and self.synced and not changed  # a new member is compared before it is asked
        main = model.parallel.is_main
        pause_s = in_flight.drain_s if in_flight and main else 0.0  # it begins with that wait for the servers
        with self._quantized():
            with phase("sync", pause_s):
                canary = [] if in_flight else self.canary  # not within a step's time limit then: see _score
                self.fleet.push(self.outgoing.buckets(model.params()), canary, in_flight, phase)
                with phase("own_canary"):
                    self.own.take()
                with phase("sync_load"):
                    scores = self.fleet.loaded()
                if digests == "every" or (digests == "first" and not self.synced):
                    self._check_digests(version)
            spreads: list[Spread] = []
            if not later:
                with phase("canary", self._score_s if in_flight and main else 0.0):
                    urls = [worker.url for worker in self.fleet.members]
                    try:
                        if in_flight:
                            spreads = self._compare_answers(self._score())
                        else:
                            spreads = self._compare_canary([*zip(urls, scores, strict=bool(scores))])
                    except WrongCanary as wrong:
                        self.fleet.leave_out({wrong.url: str(wrong)})
                        raise
        self.fleet.commit(version)
        self._scoring = self._score() if later else None
        self._learn(spreads)
        if version not in self.committed:
            self.committed.append(version)
        return values | self._canary_figures

    def settle(self) -> None:
        """Compares the canary of the last sync, where that has not waited for it: before anything is trained on, or
        evaluated, that was sampled since. The trainer's weights must still be those of that sync. Raises as sync().
        Collective.
        """
        scoring, self._scoring = self._scoring, None
        if scoring is not None:
            self._learn(self._compared(scoring))

    def _learn(self, spreads: list[Spread]) -> None:
        self.limits.learn(spreads)
        if spreads:
            self._canary_figures = {key: max(spread[n] for spread in spreads) for n, key in enumerate(CANARY_KEYS)}

    def _in_flight(self, version: int) -> InFlight | None:
        rollout, timeout_s = self.config.rollout, self.config.sync.timeout_s
        if not rollout.max_lag:
            return None  # in lock-step nothing is in flight
        # what does not drain pauses between two of its steps, which is all that ANSWER_S is for
        drain_s = max(timeout_s, rollout.request_timeout_s) if rollout.in_flight == "finish" else ANSWER_S
        return InFlight(rollout.in_flight, version, drain_s)

    def check(self) -> None:
        """The canary of every server against the trainer, without a sync. Raises WrongCanary where one differs: it does
        not hold what the last sync gave it. Collective.
        """
        scoring = self._score()
        with self._quantized():
            self.own.take()
        self._compared(scoring)

    @property
    def _score_s(self) -> float:
        """How long a canary may take: where requests are in flight it may wait until one of them is answered."""
        rollout, timeout_s = self.config.rollout, self.config.sync.timeout_s
        return max(timeout_s, rollout.request_timeout_s) if rollout.max_lag else timeout_s

    def _score(self) -> Scoring:
        """The canary, of every member."""
        return self.fleet.score(self.canary, self._score_s)

    def _compared(self, scoring: Scoring) -> list[Spread]:
        """Empty where a worker was lost: the sync is then done again without it."""
        try:
            with phase("canary", self._score_s if self.engine.model.parallel.is_main else 0.0), self._quantized():
                return self._compare_answers(scoring)
        except WorkersLost as lost:
            _tell_again(lost)
            self.sync(self.committed[-1])
            return []

    def _compare_answers(self, scoring: Scoring) -> list[Spread]:
        """Raises WorkersLost where one is lost, after the others were compared: another sync would mend what they have
        sampled with.
        """
        try:
            scores = self.fleet.scored(scoring)
        except WorkersLost:
            self._compare_canary(scoring.answered())
            raise
        return self._compare_canary(scores)

    def _quantized(self) -> AbstractContextManager[None]:
        """Inside, the trainer's weights are those that the rollout gets (sync.quantize). Collective."""
        model, sync, parallel = self.engine.model, self.config.sync, self.engine.model.parallel
        shapes, groups = model.weight_map.hf_shapes, (parallel.tp_group, parallel.etp_group)
        return quantized_weights(model.params(), shapes, sync.quantize, sync.quantize_also, *groups)

    def _check_digests(self, version: int) -> None:
        """What the workers hold against an engine loaded from disk: the
        one vLLM started with, or one made of an export.
        """
        if version == 0 and self.disk_is_step_0:
            self.fleet.check_digests(None)
            return
        folder = Path(self.config.run.dir).resolve() / ".weight_check"
        if self.engine.model.parallel.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed at this point
        export_hf(
            self.engine.model, self.config.model.path, folder, self.rollout_dtype, told=lambda: enter("an export")
        )
        try:
            if self.engine.model.parallel.is_main:
                enter("the comparison of digests", self.config.sync.timeout_s + reading_s(folder))
            self.fleet.check_digests(str(folder))
        finally:
            if self.engine.model.parallel.is_main:
                shutil.rmtree(folder, ignore_errors=True)

    def _compare_canary(self, scores: list[tuple[str, Canary]]) -> list[Spread]:
        """|log pi - log mu| over the canary, of each server, given with its URL. Raises WrongCanary where one exceeds
        its limit.
        """
        answers = [scores]
        dist.broadcast_object_list(answers, src=0, group=self.engine.model.parallel.host_group)
        if not answers[0]:
            return []
        spreads = self.own.spreads(answers[0])
        if excess := self.limits.excess(spreads):
            url = answers[0][excess.server][0]
            raise WrongCanary(
                url,
                f"weight sync: the canary differs by {excess.value:.3g} ({excess.what}; limit {excess.limit:.3g}"
                f"{excess.why}) between the trainer and {url}; the worker did not load what was sent (a coarser "
                "rollout.dtype needs sync.canary_tolerance)",
            )
        return spreads


def _tell_again(lost: WorkersLost) -> None:
    announce(f"megarl: a weight sync is done again with the workers that are left: {lost}")
