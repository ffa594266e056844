"""Which workers may serve a run, as its store tells: who is there, who leaves, who is gone and why.

Every trainer rank that asks the servers has eyes of its own, so that what a hung server has at work goes to others
without waiting for the other ranks; who belongs to the run is then agreed upon (megarl/rollout/fleet.py).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megarl.rollout import patience, registry
from megarl.rollout.registry import BEAT_S, WorkerInfo, from_known


@dataclass(frozen=True)
class Seen:
    """One look. here: registered, beating, not leaving; by number. leaving: numbers of those that only finish what they
    have. gone: by number, why a worker cannot be asked, in one line ("" where it left in order).
    """

    here: list[WorkerInfo]
    leaving: frozenset[int]
    gone: dict[int, str]


class Members:
    """What one process sees. Three store look-ups a look, however many workers there are, while nothing is new."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._news: bytes | None = None
        self._count = 0  # of numbers given out
        self._known: dict[int, WorkerInfo] = {}
        self._leaving: set[int] = set()
        self._ended: dict[int, str] = {}
        self._beats: dict[int, tuple[bytes, float]] = {}  # the last one, and when it came (monotonic)

    def look(self) -> Seen:
        """Safe from any thread. Raises DistError where the store is gone."""
        with self._lock:
            news = registry.news(self._store)
            if news != self._news:  # read before what it announces: what comes meanwhile is seen the next time
                self._read()
                self._news = news
            living = {index: worker for index, worker in self._known.items() if index not in self._ended}
            gone = {**self._ended, **self._silent(living)}
            newest = {worker.url: index for index, worker in sorted(living.items())}
            for index, worker in living.items():  # one server that registered again, after it had lost the store
                if newest[worker.url] != index:
                    gone[index] = ""
            leaving = frozenset(self._leaving - gone.keys())
            here = [living[i] for i in sorted(living) if i not in gone and i not in leaving]
            return Seen(here, leaving, gone)

    def _read(self) -> None:
        self._count = registry.claimed(self._store, known=self._count)
        for index in range(self._count):
            if index in self._ended:
                continue
            if index not in self._known and (info := registry.read(self._store, index, "info")) is not None:
                self._known[index] = from_known(json.loads(info))
            if (why := registry.read(self._store, index, "failed")) is not None:
                self._ended[index] = account(why)
            elif registry.read(self._store, index, "gone") is not None:
                self._ended[index] = ""
            elif registry.read(self._store, index, "leaving") is not None:
                self._leaving.add(index)

    def _silent(self, living: dict[int, WorkerInfo]) -> dict[int, str]:
        now, silent = time.monotonic(), {}
        beats = registry.beats(self._store, list(living))
        for index, beat in zip(living, beats, strict=True):
            before = self._beats.get(index)
            if before is None or before[0] != beat:
                self._beats[index] = (beat, now)
            elif now - before[1] > patience.STALE_S:
                worker, seconds = living[index], now - before[1]
                silent[index] = (
                    f"rollout worker {index} ({worker.url}, pid {worker.pid} on {worker.host}) has been silent for "
                    f"{seconds:.0f} s; its log is {worker.log}"
                )
        return silent


def account(failure: str) -> str:
    """The first line of what a worker reported, without what announces its log's last lines."""
    line = failure.splitlines()[0]
    head, bar, log = line.partition("; last lines of ")
    return f"{head}; its log is {log.rstrip(':')}" if bar else line


class Watch:
    """Looks every BEAT_S in a thread of its own, with a connection of its own: one look may wait, the caller does not.

    on_look: called there with what was seen.
    """

    def __init__(self, store: dist.Store, on_look: Callable[[Seen], Any] = lambda seen: None) -> None:
        self.members = Members(store)
        self._on_look, self._over = on_look, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="workers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """After this nothing is told, but where a look takes very long."""
        self._over.set()
        self._thread.join(2 * BEAT_S)

    def _watch(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                seen = self.members.look()
            except dist.DistError:  # rank 0 is gone, and whoever waits for it will know
                return
            if self._over.is_set():
                return
            try:
                self._on_look(seen)
            except Exception as error:  # nobody else watches
                what = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"megarl: the watch of the rollout workers: {what}; it goes on", file=sys.stderr, flush=True)
