"""trace.json: the phases of rank 0 as Chrome trace events, for ui.perfetto.dev or chrome://tracing.

One event a line in the JSON array format, whose closing bracket readers do without: the file is whole whenever the run
is killed, and a run that is resumed goes on in it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TRACE_FILE = "trace.json"
_file: IO[str] | None = None  # of this process
_entered: tuple[str, float, float] = ("", 0.0, 0.0)
_least_s = 0.0  # of every within_s, inside waits()


def start_trace(run_dir: str | Path) -> None:
    """From here on phase() writes to run_dir/trace.json; before, and on ranks that never
    call this, it writes nothing.
    """
    global _file
    stop_trace()
    path = Path(run_dir) / TRACE_FILE
    whole = (
        path.read_text("utf-8").rpartition("\n")[0] if path.exists() else "["
    )  # without a line that a crash cut short
    path.write_text(f"{whole}\n", "utf-8")
    _file = path.open("a", encoding="utf-8")


def stop_trace() -> None:
    global _file
    if _file is not None:
        _file.close()
    _file = None


def enter(name: str, within_s: float = 0.0) -> None:
    """Says where this rank is; its main thread alone counts. within_s: a wait that has a limit of its own is no stall
    before so many seconds.
    """
    global _entered
    if threading.current_thread() is threading.main_thread():
        _entered = name, time.monotonic(), max(within_s, _least_s)


@contextmanager
def waits(within_s: float) -> Iterator[None]:
    """Inside, in the main thread, any phase may take so long: its parts wait for others, by a limit of their own."""
    global _least_s
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _least_s = _least_s, max(within_s, _least_s)
    try:
        yield
    finally:
        _least_s = before
        enter(_entered[0])


def entered() -> tuple[str, float, float]:
    """The phase that this rank's main thread entered or left last, when (time.monotonic()), and its within_s."""
    return _entered


@contextmanager
def phase(name: str, within_s: float = 0.0) -> Iterator[None]:
    """The time inside as one event. Microseconds of the wall clock, so
    that the parts of a resumed run follow each other. within_s: see enter().
    """
    start = time.time_ns()
    enter(name, within_s)
    try:
        yield
    finally:
        enter(f"what follows {name}")
        if _file is not None:
            event = {
                "name": name,
                "ph": "X",
                "ts": start / 1e3,
                "dur": (time.time_ns() - start) / 1e3,
                "pid": 0,
                "tid": 0,
            }
            _file.write(json.dumps(event) + ",\n")
            _file.flush()


def read_trace(run_dir: str | Path) -> list[dict[str, object]]:
    """The events of run_dir/trace.json."""
    lines = (Path(run_dir) / TRACE_FILE).read_text(encoding="utf-8").split("\n")[1:]
    return [json.loads(line.rstrip(",")) for line in lines if line.endswith(",")]
