"""CPU seconds a step of everything that a command starts, seen from outside.

with CpuWatch(out) as watch:            # out: the file to which the command adds a line at the end of each step
    subprocess.run(command, check=True)
a_step(watch.samples, warm_up=3)
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

import psutil

POLL_S = 0.02  # between two looks at the file: how late a sample may be


class Sample(NamedTuple):
    """rows: steps that have ended. seconds: of CPU, of all processes so far."""

    rows: int
    seconds: float


class CpuWatch:
    """A sample whenever a step has ended. What else this process starts meanwhile counts too. The file must be new."""

    def __init__(self, rows: Path) -> None:
        self.samples: list[Sample] = []
        self._rows, self._done = rows, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CpuWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        seen = 0
        while not self._done.wait(POLL_S):
            rows = self._rows.read_bytes().count(b"\n") if self._rows.exists() else 0
            if rows != seen:
                self.samples.append(Sample(rows, seconds_below()))
                seen = rows


def seconds_below() -> float:
    """CPU seconds of all that this process has started, and of all below it, whether it runs or has ended."""
    while True:
        spent = sum(psutil.Process().cpu_times()[2:4])  # of children that were waited for, as below
        try:  # parents come first, so that who ends meanwhile is counted once, or missed and all read again
            return spent + sum(sum(each.cpu_times()[:4]) for each in psutil.Process().children(recursive=True))
        except psutil.NoSuchProcess:
            continue


def a_step(samples: list[Sample], warm_up: int) -> float:
    """The mean from the end of the warm-up, or the next sample where none was taken then, to the last step."""
    counted = [sample for sample in samples if sample.rows >= warm_up]
    if len(counted) < 2:
        raise ValueError(f"too few steps after {warm_up} were seen to end: {samples}")
    first, last = counted[0], counted[-1]
    return (last.seconds - first.seconds) / (last.rows - first.rows)
