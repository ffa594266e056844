"""A guard on the data itself: a batch whose mismatch leaves its own recent band is not trained on."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

MEMORY = 20  # batches
WARM_UP = 5  # batches before the band is known
LEAST_K3 = 1e-6  # below this, k3 is the noise of float32
LEAST_LAGGED_K3 = 1e-3  # with rollouts that overlap training: the policy's own moves, of 1e-6 to 1e-2 in turn
LEAST_DISAGREEMENT = 1e-3  # of the share of routes
# Batches in a row: hard ones come alone, and while none is trained on neither the weights nor the band move, so that
# what is out of line for so long stays so.
MOST = 10


class MismatchGuard:
    """Remembers k3 and the routes' agreement of the last batches that passed, the same on every rank.

    factor: how many times the recent median a batch may have; 0 turns the guard off. lagged: whether tokens may be of
    older weights than pi_old's. of: a digest of the settings on which the band depends.
    """

    def __init__(self, factor: float, lagged: bool = False, of: str = "") -> None:
        self.factor, self._least_k3, self._of = factor, LEAST_LAGGED_K3 if lagged else LEAST_K3, of
        self._k3: deque[float] = deque(maxlen=MEMORY)
        self._disagreement: deque[float] = deque(maxlen=MEMORY)
        self._in_a_row, self._last = 0, ""

    def judge(self, k3: float | None, agreement: float | None) -> str:
        """What is out of line, in one clause; "" where nothing is, and the batch is remembered. None: not measured."""
        disagreement = None if agreement is None else 1 - agreement
        for name, value, recent, least in (
            ("mismatch/kl_k3", k3, self._k3, self._least_k3),
            ("the share of routes that differ", disagreement, self._disagreement, LEAST_DISAGREEMENT),
        ):
            if value is None or not self.factor or len(recent) < WARM_UP:
                continue
            limit = self.factor * max(median(recent), least)
            if not value <= limit:  # not (a > b): NaN is out of line too
                self._in_a_row += 1
                self._last = (
                    f"{name} is {value:.3g}, above {limit:.3g}, which is {self.factor:g} times what it was of late"
                )
                return self._last
        self._in_a_row = 0
        for value, recent in ((k3, self._k3), (disagreement, self._disagreement)):
            if value is not None:
                recent.append(value)
        return ""

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint's state: who resumes judges as it would have done."""
        recent = {"k3": list(self._k3), "disagreement": list(self._disagreement)}
        return {**recent, "in_a_row": self._in_a_row, "last": self._last, "of": self._of}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As state_dict gave it. Between other engines there is no band yet; a run that had given up begins to count
        anew.
        """
        if state["of"] != self._of:
            return
        self._k3.extend(state["k3"])
        self._disagreement.extend(state["disagreement"])
        if state["in_a_row"] < MOST:
            self._in_a_row, self._last = state["in_a_row"], state["last"]

    def gives_up(self, step: int) -> str:
        """Why the run should stop after `step`; "" where it should not."""
        if not self.factor or self._in_a_row < MOST:
            return ""
        return (
            f"the last {MOST} batches, to step {step}, were not trained on (train.mismatch_guard {self.factor:g}): "
            f"{self._last}, though every server's canary fits; find what has changed between the engines "
            "(docs/stability.md), or raise train.mismatch_guard, or set it to 0, to go on"
        )
