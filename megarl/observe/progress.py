"""How far work is: a bar that rewrites itself on a terminal, plain lines elsewhere, of which a log keeps all."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as LiveBar

FIELDS = (
    ("reward/mean", "reward {:.3f}"),
    ("loss/value", "loss {:.4f}"),
    ("mismatch/kl_k3", "kl {:.1e}"),
    ("routing/agree_rollout_old", "agree {:.4f}"),
    ("eval/mean_at_k", "eval mean@k {:.3f}"),
    ("eval/pass_at_k", "pass@k {:.3f}"),
)
REDRAWN_S = 0.1  # a bar on a terminal, at most so often


class Bar:
    """Shows `done` of `total` and a text. What else the process prints to standard output meanwhile goes above the bar.

    every_s: where no terminal is there to see a bar, at most one line in so many seconds, and the last one.
    """

    def __init__(self, total: int, stream: TextIO | None = None, every_s: float = 10.0) -> None:
        self.total, self._every_s = total, every_s
        self._console = Console(file=stream or sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self._began = self._shown = time.monotonic()
        self._drawn = float("-inf")
        self._live: LiveBar | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = BarColumn(24), TextColumn("{task.description}", markup=False)
            self._live = LiveBar(
                *columns, console=self._console, auto_refresh=False, transient=True, redirect_stderr=False
            )
            self._task = self._live.add_task("", total=total)

    def show(self, done: int, text: str, keep: bool = False) -> None:
        """keep: the line stays on a terminal too, whatever follows it. The last line always does."""
        last = done >= self.total
        if self._live is not None and not last:
            if not keep and time.monotonic() - self._drawn < REDRAWN_S:
                return
            self._drawn = time.monotonic()
            self._live.start()
            self._console.show_cursor(True)  # a process that is killed cannot give it back
            self._live.update(self._task, completed=done, description=text, refresh=True)
        elif self._live is None and not (keep or last) and time.monotonic() - self._shown < self._every_s:
            return
        if keep or last or self._live is None:
            self.close() if last else None
            self._console.print(text)
            self._shown = time.monotonic()

    def left(self, done: int, before: int = 0) -> str:
        """Time left at the speed so far, of which `before` units do not tell."""
        speed = (done - before) / max(1e-9, time.monotonic() - self._began)
        return f"{duration((self.total - done) / speed) if speed > 0 else '?'} left"

    def close(self) -> None:
        """Takes the bar away."""
        if self._live is not None:
            self._live.stop()


class Rows:
    """Rows that are `done` ("scored") of `total`."""

    def __init__(self, done: str, total: int, stream: TextIO | None = None) -> None:
        self.what, self.done = done, 0
        self._bar = Bar(total, stream)

    def add(self, rows: int) -> None:
        self.done += rows
        self._bar.show(self.done, f"{self.what} {self.done}/{self._bar.total}  {self._bar.left(self.done)}")

    def close(self) -> None:
        self._bar.close()


class Progress:
    """Shows `step` of `steps`. Fields whose metric is missing are left out; time left follows the last 20 lines."""

    def __init__(self, steps: int, stream: TextIO | None = None, every_s: float = 0.0) -> None:
        self.steps = steps
        self._bar = Bar(steps, stream, every_s)
        self._ends: deque[tuple[int, float]] = deque(maxlen=21)  # (step, when it ended)

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Call after every step. A row with eval/* keeps its line, whatever follows it."""
        self._ends.append((step, time.monotonic()))
        self._bar.show(step, self.text(step, metrics), keep="eval/mean_at_k" in metrics)

    def text(self, step: int, metrics: Mapping[str, Any]) -> str:
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}"]
        parts += [form.format(metrics[key]) for key, form in FIELDS if metrics.get(key) is not None]
        if metrics.get("throughput/tokens_per_s") is not None:
            parts.append(f"{count(metrics['throughput/tokens_per_s'])} tok/s")
        if len(self._ends) > 1:
            (first, began), (last, ended) = self._ends[0], self._ends[-1]
            parts.append(f"{duration((ended - began) / max(1, last - first) * (self.steps - step))} left")
        return "  ".join(parts)

    def close(self) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(number: float) -> str:
    """950, 1.2k, 3.4M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
