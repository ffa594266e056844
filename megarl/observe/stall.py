"""Ranks that wait for one that is stuck: their stacks, who it is, and an end, instead of a process group's time-out.

Each rank has a thread that writes what the rank is at to LOGS/pulse/RANK.json, every few seconds. Where no rank has
entered another phase for launch.stall_s, or for as long as its wait may take where that is longer, every rank writes
its stacks to its log. Ranks whose pulse stands still are stuck as a whole (stopped, or in a call that keeps Python's
lock); the first rank that is not says so and ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarl.launch import peers
from megarl.launch.rank import FAILURES, stacks_when_asked
from megarl.launch.stop import leave
from megarl.observe import trace

PULSE, MARK = "pulse", "stalled"
BEATS = 30  # in launch.stall_s
LEAST_S, MOST_S = 0.1, 20.0  # between two beats
SILENT_S = 3.0  # and three beats: a rank whose pulse stands still for so long shows no sign of life


class StallWatch:
    """From its making to close(). Off where stall_s is 0.

    ended: what ends this process, once it has told why.
    """

    def __init__(self, logs: Path, rank: int, world: int, stall_s: float, ended: Callable[[int], None] = leave) -> None:
        self._folder, self._rank, self._world, self._stall_s = logs / PULSE, rank, world, stall_s
        self._beat_s = min(max(stall_s / BEATS, LEAST_S), MOST_S)
        self._ended, self._over, self._beats = ended, threading.Event(), 0
        if not stall_s:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._mark = self._marked()
        stacks_when_asked()
        trace.enter("the start")
        threading.Thread(target=self._watch, name="stall", daemon=True).start()

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._beat_s if self._beats else 0):
            with contextlib.suppress(OSError):  # a full disk, or a folder that is away: the run knows it first
                self._beat()
                if self._marked() != self._mark:
                    self._mark = self._marked()
                    self._dump()
                if self._late():
                    self._look()

    def _waited_s(self) -> float:
        return time.monotonic() - trace.entered()[1]

    def _late(self) -> bool:
        return self._waited_s() >= max(self._stall_s, trace.entered()[2])

    def _beat(self) -> None:
        self._beats += 1
        pulse = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pids": _pids(),
            "beat": self._beats,
            "phase": trace.entered()[0],
            "seconds": self._waited_s(),
            "late": self._late(),
        }
        partial = self._folder / f".{self._rank}"
        partial.write_text(json.dumps(pulse), encoding="utf-8")
        partial.rename(self._folder / f"{self._rank}.json")

    def _look(self) -> None:
        """Ends the run where it is true of all ranks that are alive, and this one is the first of them."""
        before = self._pulses()
        self._beat_for(3 * self._beat_s + SILENT_S)
        now = self._pulses()
        silent = {rank for rank, pulse in now.items() if before.get(rank, {}).get("beat") == pulse["beat"]}
        alive = sorted(now.keys() - silent)
        if self._over.is_set() or not all(now[rank]["late"] for rank in alive):
            return
        self._ask_for_stacks(now)
        if self._rank != min(alive):
            return
        self._beat_for(2 * self._beat_s + 1)  # the others write their stacks
        if self._over.is_set() or not self._late():
            return
        self._tell(described(now, silent, self._stall_s, self._folder.parent))
        for rank in silent & self._here(now):  # torchrun would wait for it
            with contextlib.suppress(ProcessLookupError):
                os.kill(now[rank]["pid"], signal.SIGKILL)
        self._ended(1)

    def _beat_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._over.wait(self._beat_s):
            self._beat()

    def _pulses(self) -> dict[int, dict[str, Any]]:
        pulses = {}
        for rank in range(self._world):
            with contextlib.suppress(OSError, ValueError):
                pulses[rank] = json.loads((self._folder / f"{rank}.json").read_text(encoding="utf-8"))
        return pulses

    def _here(self, pulses: dict[int, dict[str, Any]]) -> set[int]:
        here = socket.gethostname(), _pids()
        return {rank for rank, pulse in pulses.items() if (pulse["host"], pulse["pids"]) == here and rank != self._rank}

    def _ask_for_stacks(self, pulses: dict[int, dict[str, Any]]) -> None:
        """Of this rank, of those on this host by a signal, of others by a mark that they look for."""
        if self._marked() == self._mark:
            (self._folder / MARK).write_text(f"{time.time_ns()}", encoding="utf-8")
        self._mark = self._marked()
        self._dump()
        for rank in self._here(pulses):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pulses[rank]["pid"], signal.SIGUSR2)

    def _dump(self) -> None:
        print(f"stacks of rank {self._rank}, pid {os.getpid()}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _marked(self) -> str:
        with contextlib.suppress(OSError):
            return (self._folder / MARK).read_text(encoding="utf-8")
        return ""

    def _tell(self, line: str) -> None:
        print(f"megarl: error: {line}", file=sys.stderr, flush=True)
        peers.tell(f"megarl: error: {line}")
        with (self._folder.parent / FAILURES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "rank": self._rank, "stall": line}) + "\n")


def _pids() -> str:
    """Whose process ids this process sees: each container of a host has its own, and may have the host's name."""
    return os.readlink("/proc/self/ns/pid")


def described(pulses: dict[int, dict[str, Any]], silent: set[int], stall_s: float, logs: Path) -> str:
    """Who is missing, and where the others wait: those that are not where most are, if all have a pulse."""
    by_phase: dict[str, list[int]] = {}
    for rank in sorted(pulses.keys() - silent):
        by_phase.setdefault(pulses[rank]["phase"], []).append(rank)
    most, *others = sorted(by_phase, key=lambda phase: -len(by_phase[phase]))
    missing = [
        f"rank {rank} (pid {pulses[rank]['pid']} on {pulses[rank]['host']}) shows no sign of life, last in "
        f"{pulses[rank]['phase']}"
        for rank in sorted(silent)
    ]
    missing += [f"{_ranks(by_phase[phase])} in {phase}" for phase in others]
    where = "; ".join([*missing, f"{_ranks(by_phase[most])} in {most}"])
    return f"no rank went on for launch.stall_s {stall_s:g} s: {where}; stacks are in {logs}/trainer_RANK.log"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
