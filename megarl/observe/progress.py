"""The live line: one that rewrites itself on a terminal, a plain line a step elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

FIELDS = (
    ("reward/mean", "reward {:.3f}"),
    ("loss/value", "loss {:.4f}"),
    ("mismatch/kl_k3", "kl {:.1e}"),
    ("routing/agree_rollout_old", "agree {:.4f}"),
    ("eval/mean_at_k", "eval mean@k {:.3f}"),
    ("eval/pass_at_k", "pass@k {:.3f}"),
)


class Progress:
    """Shows `step` of `steps`. Fields whose metric is missing are left out; time left follows the last 20 lines."""

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self.steps = steps
        self.stream = sys.stdout if stream is None else stream
        self._live = self.stream.isatty()
        self._ends: deque[tuple[int, float]] = deque(maxlen=21)  # (step, when it ended)

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Call after every step. A row with eval/* keeps its line, whatever follows it."""
        self._ends.append((step, time.monotonic()))
        text = self.text(step, metrics)
        evaluated = "eval/mean_at_k" in metrics
        if self._live:
            end = "\n" if evaluated or step >= self.steps else ""
            self.stream.write(f"\r{text}\x1b[K{end}")
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def text(self, step: int, metrics: Mapping[str, Any]) -> str:
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}"]
        parts += [form.format(metrics[key]) for key, form in FIELDS if metrics.get(key) is not None]
        if metrics.get("throughput/tokens_per_s") is not None:
            parts.append(f"{count(metrics['throughput/tokens_per_s'])} tok/s")
        if len(self._ends) > 1:
            (first, began), (last, ended) = self._ends[0], self._ends[-1]
            parts.append(f"{duration((ended - began) / max(1, last - first) * (self.steps - step))} left")
        return "  ".join(parts)


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
