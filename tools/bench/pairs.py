"""Two pieces of work timed in pairs, one after the other in random
order, so that what else the machine does falls on both.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

WARM_UP = 5
Seconds = tuple[float, float]  # on the clock, and of CPU time: the latter does not count what others do meanwhile


def interval(ratios: list[float]) -> tuple[float, float]:
    """Bootstrap 95% interval of the median."""
    rng = np.random.default_rng(0)
    values = np.array(ratios)
    medians = np.median(values[rng.integers(0, len(values), (10_000, len(values)))], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def ratio(first: list[float], second: list[float]) -> dict[str, Any]:
    """The median ratio within a pair, its interval, and the medians of both."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return {
        "pairs": len(ratios),
        "median_ratio": statistics.median(ratios),
        "interval_95": list(interval(ratios)),
        "first_s": statistics.median(first),
        "second_s": statistics.median(second),
    }


def interleaved(
    first: Callable[[], Seconds], second: Callable[[], Seconds], pairs: int, warm_up: int = WARM_UP
) -> tuple[list[Seconds], list[Seconds]]:
    """Seconds of both, pair by pair. The order within a pair is random, and the same in every process."""
    draw = random.Random(0)
    times: tuple[list[Seconds], list[Seconds]] = ([], [])
    for pair in range(warm_up + pairs):
        order = [(first, 0), (second, 1)]
        draw.shuffle(order)
        for call, which in order:
            gc.collect()
            seconds = call()
            if pair >= warm_up:
                times[which].append(seconds)
    return times


def on_clock(times: tuple[list[Seconds], list[Seconds]]) -> dict[str, Any]:
    return ratio(*([wall for wall, _ in side] for side in times))


def on_cpu(times: tuple[list[Seconds], list[Seconds]]) -> dict[str, Any]:
    return ratio(*([cpu for _, cpu in side] for side in times))
