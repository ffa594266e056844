"""What a simulated rank records: allocations, waits of the host and collectives, each with its phase and its line.

Bytes of an allocation are rounded as torch's caching allocator rounds them; fragmentation is not simulated.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import NamedTuple

BLOCK = 512  # bytes: what torch's caching allocator rounds to
OURS = "megarl"
THEIRS = "megatron"
SELF = str(PurePath(__file__).parent)


class Line(NamedTuple):
    """Of the source: file below its package, function, number."""

    file: str
    function: str
    number: int

    @property
    def place(self) -> str:
        """Without the number, which moves with every edit above it."""
        return f"{self.file} {self.function}"

    def __str__(self) -> str:
        return f"{self.file}:{self.number} {self.function}"


class Wait(NamedTuple):
    """The host stops until the device has caught up."""

    phase: str
    what: str
    line: Line


class Sent(NamedTuple):
    """A collective: `group` as megatron-core describes it, `ranks` of it in the world, kind as c10d names it."""

    phase: str
    group: str
    ranks: tuple[int, ...]
    kind: str
    line: Line


class Event(NamedTuple):
    """An allocation (size > 0) or the end of one (< 0)."""

    phase: str
    size: int
    line: Line


@dataclass
class Peak:
    """Of one phase: most bytes at once, and those bytes by the line that allocated them, largest first."""

    bytes: int
    lines: list[tuple[Line, int]]


@dataclass
class Ledger:
    """sent: bytes of the tensor that this rank gives to each collective. calls: how often. flops: by phase."""

    phase: str = "start"
    live: int = 0
    peak: int = 0  # since the ledger began
    events: list[Event] = field(default_factory=list)
    waits: Counter[Wait] = field(default_factory=Counter)
    copies: Counter[Wait] = field(default_factory=Counter)  # to pinned memory: the host does not wait for them
    sent: Counter[Sent] = field(default_factory=Counter)
    calls: Counter[Sent] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    unknown: Counter[Wait] = field(default_factory=Counter)  # numbers that the host asked for and nobody knew

    def allocate(self, size: int, line: Line) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        self.events.append(Event(self.phase, size, line))

    def free(self, size: int, line: Line) -> None:
        self.live -= size
        self.events.append(Event(self.phase, -size, line))

    def wait(self, what: str) -> None:
        self.waits[Wait(self.phase, what, source_line())] += 1

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def curve(self) -> list[tuple[str, int]]:
        """(phase, bytes) after each event."""
        total, points = 0, []
        for event in self.events:
            total += event.size
            points.append((event.phase, total))
        return points

    def peaks(self) -> dict[str, Peak]:
        """Of each phase, in order."""
        best: dict[str, tuple[int, int]] = {}  # phase -> bytes, event
        for i, (phase, total) in enumerate(self.curve()):
            if phase not in best or total > best[phase][0]:
                best[phase] = total, i
        at = {i: phase for phase, (_, i) in best.items()}
        held: Counter[Line] = Counter()
        peaks = {phase: Peak(total, []) for phase, (total, _) in best.items()}
        for i, event in enumerate(self.events):
            held[event.line] += event.size
            if i in at:
                peaks[at[i]].lines = [(line, size) for line, size in held.most_common() if size > 0]
        return peaks


def rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def source_line() -> Line:
    """The innermost line of megarl (this room apart) or megatron-core that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        name = code.co_filename
        if _is_ours(name):
            return Line(_short(name), code.co_qualname, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return Line("autograd", "backward", 0)  # of an operator; on a thread of torch's own


def source_lines(depth: int = 6) -> str:
    """For an error: the lines that lead there, innermost first."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < depth:
        if _is_ours(frame.f_code.co_filename):
            found.append(f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)


_known: dict[str, tuple[bool, str]] = {}


def _look(name: str) -> tuple[bool, str]:
    if name not in _known:
        parts = PurePath(name).parts
        package = next((p for p in (THEIRS, OURS) if p in parts), None)
        start = len(parts) - 1 - parts[::-1].index(package) if package else 0
        _known[name] = package is not None and not name.startswith(SELF), "/".join(parts[start:])
    return _known[name]


def _is_ours(name: str) -> bool:
    return _look(name)[0]


def _short(name: str) -> str:
    return _look(name)[1]
