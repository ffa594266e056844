"""The rollout workers as the trainer sees them: found through the run's store, asked by ingest ranks, refitted by rank
0. They come and go: who belongs to the run is agreed upon before each step and each sync, from what rank 0 finds
(roll_call.py).
"""

from __future__ import annotations

import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from megarl.addresses import spans_hosts
from megarl.checkpoints import newest
from megarl.config import Config
from megarl.errors import Stopped, UserError
from megarl.rollout.client import RolloutClient, answering
from megarl.rollout.members import Seen, Watch
from megarl.rollout.patience import ACCOUNT_S, ENGINE_ACCOUNT_S
from megarl.rollout.registry import (
    Refusals,
    RolloutError,
    WorkerInfo,
    check_workers,
    open_store,
    request_shutdown,
    wait_for_workers,
)
from megarl.rollout.roll_call import RollCall
from megarl.rollout.store import open_run_store
from megarl.rollout.sync_leader import Canary, InFlight, Phase, Scoring, SyncLeader, SyncSettings, untraced
from megarl.rollout.wire import ENGINE_DIED
from megarl.weights.transport.send import Outgoing, WeightSender

T = TypeVar("T")


class WorkersLost(RolloutError):
    """A sync failed because a worker is gone. On every rank alike: it can be done again with the rest."""


class LeftOut(WorkersLost):
    """A sync failed by a worker that has never served: it is left out from now on, and nothing is lost."""


class Fleet:
    """Rank 0 owns the store and leads the syncs; every ingest rank has a client and eyes on the store; senders are in
    the weight group.

    workers: those that are asked; they hold the weights of the last sync. members: those that take part in the next.
    """

    _watch: Watch | None = None  # rank 0 and ingest ranks
    _store: Any = None
    _leader: SyncLeader | None = None
    _sender: WeightSender | None = None
    _unsent: Exception | None = None  # of this rank's part in the last push()
    _roll_call: RollCall | None = None  # rank 0
    client: RolloutClient | None = None
    _hosts: dist.ProcessGroup | None = None  # where all ranks meet; None is the default group
    _one_tp = False
    _grouped: list[WorkerInfo] | None = None  # the workers of the weight group, where there is one
    _agreeing: list[str] | None = None  # rank 0, after the first sync: parts that a worker must hold as received
    _joined = 0  # since the last figures()

    def __init__(
        self, config: Config, device: torch.device, *, is_ingest: bool, hosts: dist.ProcessGroup | None = None
    ) -> None:
        """Collective: waits, on rank 0, until rollout.engines workers have registered, or those that a run which was
        under way still has; raises UserError, named, if they do not.

        hosts: of all ranks, for host memory; None is the default group. Ranks wait here for what servers do, and a
        kernel of NCCL's would take the time of a GPU that they share.
        """
        self._device, self._hosts, wait_s = device, hosts, config.rollout.start_timeout_s
        self._one_tp = config.sync.transport == "reshard"
        self._out: set[int] = set()  # workers that this rank asks no more, before all ranks have agreed
        main = dist.get_rank() == 0
        came: tuple[list[WorkerInfo], tuple[str, int]] = [], ("", 0)
        if main:
            self._store, where = open_run_store(config, spans_hosts=spans_hosts())
            refusals = Refusals(self._store)
            resumed = newest(Path(config.run.dir) / "checkpoints") is not None
            workers = wait_for_workers(self._store, config.rollout.engines, wait_s, refusals, resumed)
            came = workers, where
        self.workers, self._address = self._from_rank_0(came)
        self.members, (host, port) = self.workers, self._address
        asking = self._count(is_ingest)  # each of its own accord: all together ask for what a server decodes at once
        if is_ingest or main:
            if not main:
                self._store = open_store(host, port, is_master=False, timeout_s=wait_s)
            at_once = max(config.rollout.max_num_seqs // asking, 1)
            self.client = RolloutClient(self.workers, config.rollout.request_timeout_s, at_once=at_once)
            eyes = open_store(host, port, is_master=False, timeout_s=wait_s)
            self._watch = Watch(eyes, self._seen)
            if main:
                self._roll_call = RollCall(self._watch.members, refusals, self.workers, wait_s)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns a broken connection into the worker's own account of its death, where it left one."""
        try:
            yield
        except RolloutError as error:
            if self._store is not None:
                wait_s = ENGINE_ACCOUNT_S if ENGINE_DIED in str(error) else ACCOUNT_S
                check_workers(self._store, self.workers, wait_s=wait_s)
            raise

    def check(self, ask_all: bool = True) -> None:
        """Collective: whom to ask from now on. What was lost and what has come is told on rank 0. `workers` may be
        empty then: whoever comes must have the weights first. ask_all: as of gather().
        """
        here = self._roll_call.answer(self.workers, ask_all) if self._roll_call is not None else []
        agreed = self._from_rank_0([worker.index for worker in here])
        self._ask([worker for worker in self.workers if worker.index in agreed])

    def gather(self, asked: Callable[[], int] = lambda: 0, ask_all: bool = True) -> bool:
        """Collective, before a sync: agrees on its members, all workers that are there and answer. Whether they need a
        new group. Where there is none, rank 0 waits rollout.start_timeout_s for one, then every rank raises UserError;
        Stopped where a signal came meanwhile. asked: its number, or 0. ask_all: also workers that have answered a
        moment ago: no for a sync that begins with a question to all, its pause.
        """
        answer: list[WorkerInfo] | str | int = self.workers
        if self._roll_call is not None:
            answer = self._roll_call.wait(self.workers, asked, ask_all)
        answer = self._from_rank_0(answer)
        if isinstance(answer, str):
            raise UserError(answer)
        if isinstance(answer, int):
            raise Stopped(answer)
        self.members = answer
        return self._grouped != answer

    def connect(self, settings: SyncSettings, manifest_inputs: dict[str, Any], remember_disk: bool) -> None:
        """Collective: the group that weights travel by. See SyncLeader.init; of manifest_inputs only rank 0's count.
        Raises WorkersLost.
        """
        self._leave_group()
        rank, name, (host, port) = dist.get_rank(), self._from_rank_0(uuid.uuid4().hex), self._address
        world = settings.senders + sum(worker.tp for worker in self.members)

        def join() -> WeightSender:
            store = self._store or open_store(host, port, is_master=False, timeout_s=settings.timeout_s)
            return WeightSender(store, name, rank, world, settings.timeout_s, self._device, settings.shared)

        def enter() -> None:
            if rank == 0:
                self._leader = SyncLeader(self.members, host, port, settings)
                self._sender = self._leader.init(name, manifest_inputs, join, remember_disk, self._agreeing)
            elif rank < settings.senders:
                self._sender = join()

        self._settled(enter)
        self._grouped = self.members
        if self._roll_call is not None and self._one_tp:
            self._roll_call.tp = self.members[0].tp

    def push(
        self,
        buckets: Iterable[Outgoing],
        canary: list[int],
        in_flight: InFlight | None = None,
        phase: Phase = untraced,
    ) -> None:
        """Collective: sends this rank's buckets. The members load them meanwhile and score the canary: see loaded(),
        which also raises what failed on another rank than 0. phase: see SyncLeader.push. Raises WorkersLost.
        """
        sender, leader, stream = self._sender, self._leader, iter(buckets)
        self._unsent = None

        def send() -> None:
            try:
                if leader is not None and sender is not None:
                    leader.push(lambda: sender.send(stream), canary, sender.close, in_flight, phase)
                elif sender is not None:
                    sender.send(stream)
                else:
                    deque(stream, maxlen=0)
            except Exception as error:
                if leader is None:  # rank 0 need not know yet: it sends its own part, and servers answer later
                    self._unsent = error
                    self._own_part_failed(error)
                    return
                if leader.settings.transport == "broadcast":  # the other ranks wait until this one has taken all
                    with suppress(Exception):
                        deque(stream, maxlen=0)
                raise

        self._settled(send)

    def loaded(self) -> list[Canary]:
        """Collective, after push(): once all have loaded, rank 0 returns their scores of the canary; they do not serve
        yet. Elsewhere an empty list. Raises WorkersLost.
        """
        leader, unsent = self._leader, self._unsent

        def wait() -> list[Canary]:
            if unsent is not None:
                raise unsent
            return leader.loaded() if leader is not None else []

        return self._settled(wait)

    def score(self, canary: list[int], timeout_s: float) -> Scoring:
        """Asks the members, on rank 0, for the canary beside whatever else they do."""
        return Scoring(self.members if dist.get_rank() == 0 else [], canary, timeout_s)

    def scored(self, scoring: Scoring) -> list[tuple[str, Canary]]:
        """Collective: the scores of all that were asked, by URL; elsewhere than on rank 0 an empty list. Raises
        WorkersLost where one of them is lost, RolloutError where one does not score though it is there.
        """

        def here() -> list[str]:
            workers = self._roll_call.here() if self._roll_call is not None else self.members
            return [worker.url for worker in workers]

        return self._settled(lambda: scoring.scores(here), scoring)

    def check_digests(self, folder: str | None) -> None:
        """Collective. Raises WorkersLost; RolloutError where a worker holds other weights."""
        leader = self._leader
        self._settled(lambda: leader.check(folder) if leader is not None else None)

    def commit(self, version: int) -> None:
        """Collective: the members serve, under this version, and are asked from now on. Raises WorkersLost."""
        leader = self._leader
        first = self._one_tp and self._agreeing is None  # whole tensors agree where one rank holds them all, else not
        agreeing = self._settled(lambda: leader.commit(version, first) if leader is not None else [])
        if first:
            self._agreeing = agreeing
        before = {worker.index for worker in self.workers}
        self._joined += sum(worker.index not in before for worker in self.members)
        if self._roll_call is not None:
            self._roll_call.heard(self.members)
        self._ask(self.members)

    def figures(self) -> dict[str, float]:
        """Collective: of the fleet, since this was asked last."""
        lost = self._roll_call.newly_lost() if self._roll_call is not None else 0
        joined, self._joined = self._joined, 0
        again = torch.tensor(self.client.dispatcher.taken_back() if self.client else 0)
        dist.all_reduce(again, group=self._hosts)
        return {
            "fleet/workers": float(len(self.workers)),
            "fleet/lost": float(lost),
            "fleet/joined": float(joined),
            "fleet/asked_again": float(again),
        }

    @property
    def push_seconds(self) -> dict[str, float]:
        """Where the last push took its time, on rank 0."""
        return self._leader.seconds if self._leader is not None else {}

    def turn(self, step: Literal["sleep", "wake"]) -> None:
        """Collective: every server sleeps, or is awake, when this returns. After the first sync.

        Whoever asks has done its part before: on every rank the memory
        that a server takes is free, and no ingest rank asks it for more.
        """
        idle(self._device)  # vLLM refuses to sleep where the device's free memory shrinks meanwhile
        dist.barrier(group=self._hosts)
        if self._leader is not None:
            with self.watched():
                self._leader.turn(step)
        dist.barrier(group=self._hosts)

    def close(self, run_is_over: bool = True) -> None:
        """Safe after a failure. run_is_over: rank 0 ends the workers too; else they wait for trainers to come back."""
        if self._watch is not None:
            self._watch.close()
        if self.client is not None:
            self.client.close()
        self._leave_group()
        if run_is_over and self._store is not None and dist.get_rank() == 0:
            here = self._roll_call.here() if self._roll_call is not None else self.workers
            request_shutdown(self._store, here)

    def _from_rank_0(self, what: T) -> T:
        """What rank 0 says. Collective."""
        objects = [what]
        dist.broadcast_object_list(objects, src=0, group=self._hosts)
        return objects[0]

    def _count(self, here: bool) -> int:
        """On how many ranks. Collective."""
        ranks = torch.tensor(int(here))
        dist.all_reduce(ranks, group=self._hosts)
        return int(ranks)

    def leave_out(self, failed: dict[str, str]) -> None:
        """Collective, where a sync fails by these servers, given by URL with their faults: raises LeftOut where one of
        them has never served, and others are there to go on with.
        """
        new = {worker.url: worker for worker in self.members if worker not in self.workers}
        first = next((url for url in [*failed] if url in new), None)
        if first is None or len(self.members) == 1:
            return
        cause = next(iter(failed.values()))  # a failure ends what others do, and theirs may be told before it
        before = f" (before it: {cause})" if cause != failed[first] else ""
        why = (
            f"rollout worker {new[first].index} ({first}) is not used, since its first weight sync failed: "
            f"{failed[first]}{before}; mend that and start it again"
        )
        if self._roll_call is not None:
            self._roll_call.leave_out(new[first], why)
        raise LeftOut(why)

    def _settled(self, part: Callable[[], T], scoring: Scoring | None = None) -> T:
        """Collective: this rank's part in a step of a sync. Where rank 0's failed, every rank raises, and no group is
        left: WorkersLost where a member is gone, LeftOut where a new one failed, else what happened. A part that failed
        elsewhere is left to rank 0, which knows more. scoring: what was waited for; None: what the leader posted.
        """
        result: Any = []
        error: Exception | None = None
        try:
            result = part()
        except Exception as raised:  # of whatever kind: the others wait for this rank's word
            error = raised
        rank = dist.get_rank()
        if error is not None and rank and error is not self._unsent:
            self._own_part_failed(error)
        verdict = self._verdict(error, scoring or self._leader) if error is not None and rank == 0 else None
        failed = self._from_rank_0(verdict)
        if failed is None:
            if error is not None:
                raise error
            return result
        self._leave_group()
        # no server is blamed for what a rank that stands still did not send: launch.stall_s names it
        dist.barrier(group=self._hosts)
        raise error if error is not None and type(verdict) is RolloutError else failed

    def _verdict(self, error: Exception, asked: SyncLeader | Scoring | None) -> RolloutError:
        """On rank 0: what every rank raises. asked: who knows which servers failed."""
        what = " ".join(str(error).split())
        if self._roll_call is not None:
            self._roll_call.held(self.members)
        if self._one_is_gone(error):
            return WorkersLost(what)
        try:
            self.leave_out(asked.failed if asked is not None else {})
        except LeftOut as left_out:
            return left_out
        return RolloutError(what)

    def _own_part_failed(self, error: Exception) -> None:
        """Elsewhere than on rank 0. It stands in this rank's log, since what all raise in the end is rank 0's word; and
        whoever waits for this rank's messages fails.
        """
        what = " ".join(str(error).split())
        print(f"megarl: trainer rank {dist.get_rank()}: its part in a weight sync failed: {what}", file=sys.stderr)
        if self._sender is not None:
            self._sender.close()

    def _one_is_gone(self, error: Exception) -> bool:
        """On rank 0: whether a member is why a step failed."""
        if self._roll_call is not None:
            return self._roll_call.one_is_gone(self.members, error)
        return answering(self.members) != self.members  # nobody calls a roll: a tool joined the workers of others

    def _ask(self, workers: list[WorkerInfo]) -> None:
        self.workers, self._out = workers, set()
        if self.client is not None:
            self.client.set_workers(workers)

    def _seen(self, seen: Seen) -> None:
        """In the watching thread of an ingest rank: what workers that are gone have at work goes to others at once."""
        if self.client is None:
            return
        out = self._out  # another after the next step's agreement
        asked = [worker for worker in self.workers if worker.index not in out]
        gone = [worker for worker in asked if seen.gone.get(worker.index)]
        leaving = [worker for worker in asked if worker.index in seen.leaving]
        if gone:
            self.client.dispatcher.drop({worker.url: seen.gone[worker.index] for worker in gone})
        for worker in leaving:
            self.client.dispatcher.retire(worker.url)
        out.update(worker.index for worker in [*gone, *leaving])

    def _leave_group(self) -> None:
        if self._sender is not None:
            self._sender.close()
        if self._leader is not None:
            self._leader.close()
        self._leader = self._sender = self._grouped = None


def idle(device: torch.device) -> None:
    """Returns once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
