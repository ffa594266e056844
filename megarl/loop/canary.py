"""The canary of a weight sync: how far both engines may differ on the same tokens, along the same routes.

The largest difference has a fixed limit. A policy that sharpens takes the largest of 64 tokens to 1.5e-4 in float32 by
rounding alone, while the median stays at 2e-6; in bfloat16 it reaches what a model with a stale layer reaches. So other
figures are held to what the syncs before measured: the median, which a layer that was not loaded moves, and in bfloat16
the tail, which an expert moves that few tokens see.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from megarl.errors import UserError

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # of the largest, by the coarser of the two engines
FIRST = {torch.float32: 1e-4, torch.bfloat16: 0.25}  # what the median of the first sync may be
FACTOR = 4.0  # times the usual; from one sync to the next both moved by less than 2 where all was well
FLOOR = {torch.float32: 1e-4, torch.bfloat16: 1e-3}  # nats: no limit is below it
WINDOW = 20  # syncs that make the usual: it follows a policy that sharpens, not a jump
TAIL = 16  # the tail is the mean of the largest sixteenth


class Spread(NamedTuple):
    """|log pi - log mu| over the canary's tokens, of one server."""

    median: float
    tail: float
    largest: float


def spread_of(differences_T: Tensor) -> Spread:
    """Of T differences, signed or not. NaN counts as infinite."""
    sizes = differences_T.double().abs().nan_to_num(nan=torch.inf, posinf=torch.inf).sort().values
    return Spread(float(sizes.median()), float(sizes[-max(1, len(sizes) // TAIL) :].mean()), float(sizes[-1]))


class WrongCanary(UserError):
    """A server's score of the canary cannot be right."""

    def __init__(self, url: str, line: str) -> None:
        super().__init__(line)
        self.url = url


class Excess(NamedTuple):
    """What is too large, and on which server."""

    server: int
    what: str
    value: float
    limit: float
    why: str


class CanaryLimits:
    """tolerance: of the largest difference, as the user gave it, or None; coarse: the coarser dtype of both engines."""

    def __init__(self, tolerance: float | None, coarse: torch.dtype) -> None:
        self.tolerance = tolerance or TOLERANCE[coarse]
        self._calibrates, self._coarse = tolerance is None, coarse
        self._figures = ("median",) if coarse == torch.float32 else ("median", "tail")
        self._seen: deque[Spread] = deque(maxlen=WINDOW)  # of the syncs that were taken, the largest of all servers

    def excess(self, servers: list[Spread]) -> Excess | None:
        """The first server one of whose figures is beyond its limit."""
        limits = [("largest difference", 2, self.tolerance, "")]
        if self._calibrates:
            for figure, name in enumerate(self._figures) if self._seen else ():
                usual = median(spread[figure] for spread in self._seen)
                why = f", {FACTOR:g} times what the syncs before had"
                limits.append((name, figure, max(FACTOR * usual, FLOOR[self._coarse]), why))
            if not self._seen:
                limits.append(("median", 0, FIRST[self._coarse], ""))
        for name, figure, limit, why in limits:
            for number, spread in enumerate(servers):
                if spread[figure] > limit:
                    return Excess(number, name, spread[figure], limit, why)
        return None

    def learn(self, servers: list[Spread]) -> None:
        """From a sync that was taken."""
        if servers:
            self._seen.append(Spread(*(max(figures) for figures in zip(*servers, strict=True))))
