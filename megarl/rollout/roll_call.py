"""Which workers are there and answer, as rank 0 finds it: the store says who has come, left or failed, the servers say
whether they live. It is told on the terminal, once for each worker. All ranks then agree upon it: fleet.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from megarl.announce import plural
from megarl.rollout.client import answering, let_go
from megarl.rollout.members import Members, Seen
from megarl.rollout.patience import ACCOUNT_S, ENGINE_ACCOUNT_S
from megarl.rollout.registry import Refusals, ServerSilent, WorkerInfo
from megarl.rollout.wire import ENGINE_DIED

FRESH_S = 1.0  # whoever has answered so lately is not asked again


class RollCall:
    """Held by rank 0 alone. workers: in each method those that are asked, of which some may be lost by now."""

    tp: int | None = None  # which all must have, once there was a group
    _lost = 0  # since the last newly_lost()
    _last_words = ""  # of the worker that was lost last

    def __init__(self, roll: Members, refusals: Refusals, workers: list[WorkerInfo], wait_s: float) -> None:
        """wait_s: how long wait() waits."""
        self._roll, self._refusals, self._wait_s = roll, refusals, wait_s
        self._met = {worker.index for worker in workers}  # those of which was told
        self._silent: set[int] = set()  # workers that did not answer when a sync failed: not asked twice
        self._left_out: set[int] = set()  # workers whose first sync failed
        self._heard, self._heard_at = list[WorkerInfo](), 0.0
        self._held = list[WorkerInfo]()  # by a sync that failed, maybe in a pause, and by none that was whole since

    def here(self) -> list[WorkerInfo]:
        """As the store says; no server is asked."""
        return self._roll.look().here

    def heard(self, workers: list[WorkerInfo]) -> None:
        """They have answered just now, at the end of a sync."""
        self._heard, self._heard_at = workers, time.monotonic()
        self._held = [worker for worker in self._held if worker not in workers]

    def held(self, workers: list[WorkerInfo]) -> None:
        """A sync of theirs has failed. Whoever leaves is in no other, which would end its pause: it is let go."""
        self._held += [worker for worker in workers if worker not in self._held]

    def answer(self, workers: list[WorkerInfo], ask_all: bool = True) -> list[WorkerInfo]:
        """Those of them that are there and answer. ask_all: also who has answered lately, since when one may have died:
        what was heard of them is forgotten.
        """
        if ask_all:
            self._heard = []
        return self._look(workers, only=workers, heard=self._lately())

    def wait(
        self, workers: list[WorkerInfo], asked: Callable[[], int], ask_all: bool = True
    ) -> list[WorkerInfo] | str | int:
        """All that are there, answer and fit, once there is one; else why the run cannot go on, or the number of the
        signal that asked() told meanwhile. ask_all: also who has answered lately.
        """
        deadline = time.monotonic() + self._wait_s
        while True:
            heard = () if ask_all else self._lately()
            members = [worker for worker in self._look(workers, heard=heard) if self._fits(worker)]
            if members:
                return members
            if signum := asked():
                return signum
            if time.monotonic() > deadline:
                return (
                    f"no rollout worker is left, and none came within rollout.start_timeout_s = {self._wait_s:g} s; "
                    f"start `megarl rollout` with the same launch.store. The last one: {self._last_words}"
                )
            time.sleep(0.2)

    def one_is_gone(self, members: list[WorkerInfo], error: Exception) -> bool:
        """After a sync's failure, whether a member failed, fell silent or does not answer; the worker's own account may
        take a moment. Who was too late is asked at once.
        """
        deadline = time.monotonic() + (ENGINE_ACCOUNT_S if ENGINE_DIED in str(error) else ACCOUNT_S)
        if isinstance(error, ServerSilent) and self._one_is_silent(members):
            return True
        while time.monotonic() < deadline:
            here = self.here()
            if any(worker not in here for worker in members):
                return True
            time.sleep(0.2)
        return self._one_is_silent(members)

    def leave_out(self, worker: WorkerInfo, why: str) -> None:
        """From now on."""
        self._left_out.add(worker.index)
        self._last_words = why

    def newly_lost(self) -> int:
        """How many, since this was asked last. One that leaves is none."""
        lost, self._lost = self._lost, 0
        return lost

    def _lately(self) -> Collection[WorkerInfo]:
        return self._heard if time.monotonic() - self._heard_at < FRESH_S else ()

    def _one_is_silent(self, members: list[WorkerInfo]) -> bool:
        alive = answering(members)
        self._silent = {worker.index for worker in members if worker not in alive}
        return bool(self._silent)

    def _look(
        self,
        workers: list[WorkerInfo],
        only: list[WorkerInfo] | None = None,
        heard: Collection[WorkerInfo] = (),
    ) -> list[WorkerInfo]:
        """Who is there and answers; tells of it. A worker whose server has died may need a moment for its own account.
        only: nobody else is asked. heard: who has answered already.
        """
        silent, self._silent = self._silent, set()
        seen = self._roll.look()
        out = silent | self._left_out
        here = [w for w in seen.here if (only is None or w in only) and w.index not in out]
        answers = answering([worker for worker in here if worker not in heard])
        alive = [worker for worker in here if worker in heard or worker in answers]
        deadline = time.monotonic() + ACCOUNT_S
        while time.monotonic() < deadline and any(
            worker in seen.here and worker not in alive and worker.index not in silent for worker in workers
        ):
            time.sleep(0.1)
            seen = self._roll.look()
        alive = [worker for worker in alive if worker in seen.here]  # one may have left while another was waited for
        self._tell_of(seen, workers, alive)
        self._held = [w for w in self._held if w.index not in seen.leaving or not let_go(w)]
        return alive

    def _tell_of(self, seen: Seen, workers: list[WorkerInfo], alive: list[WorkerInfo]) -> None:
        """Prints, once for each worker, that it is lost, has come, or is refused."""
        self._refusals.announce_new()
        for worker in workers:
            if worker.index in self._met and worker not in alive:
                self._met.discard(worker.index)
                leaves = worker.index in seen.leaving or seen.gone.get(worker.index) == ""
                why = seen.gone.get(worker.index) or f"rollout worker {worker.index} ({worker.url}) does not answer"
                if leaves:
                    why = f"rollout worker {worker.index} ({worker.url}) leaves"
                else:
                    self._lost, self._last_words = self._lost + 1, why
                print(f"megarl: {why}; {plural(len(alive), 'worker')} left", flush=True)
        for worker in seen.here:
            if worker.index not in self._met and worker in alive:
                self._met.add(worker.index)
                then = "it gets the weights at the next sync"
                if not self._fits(worker):
                    then = f"it is not used: its rollout.tp {worker.tp} is not {self.tp}, that of the others"
                print(f"megarl: rollout worker {worker.index} ({worker.url}) has come; {then}", flush=True)

    def _fits(self, worker: WorkerInfo) -> bool:
        """A plan of slices is for servers that are all cut alike. What comes first is compared by Refit.connect."""
        return self.tp in (None, worker.tp)
