"""How often, and after how long, a process that failed is started again."""

from __future__ import annotations

import time

FIRST_S, MOST_S = 1.0, 30.0
STEADY_S = 600.0  # what ran for so long is not counted among the failures in a row


class Backoff:
    """At most `most` starts in a row: 1 s before the first, twice as long before each further one, up to 30 s.

    used: how many of them were made.
    """

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0
        self._began = time.monotonic()

    def began(self) -> None:
        """It works, from now on."""
        self._began = time.monotonic()

    def next(self) -> float | None:
        """After a failure: seconds to wait before the next start; None where there is to be none."""
        if time.monotonic() - self._began > STEADY_S:
            self.used = 0
        if self.used >= self.most:
            return None
        self.used += 1
        return min(FIRST_S * 2 ** (self.used - 1), MOST_S)
