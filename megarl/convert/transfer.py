"""The live line of work that is counted in bytes: one that rewrites
itself on a terminal, a plain line every few seconds elsewhere.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from megarl.observe.progress import duration

EVERY_S = {True: 0.1, False: 10.0}  # on a terminal; elsewhere
WIDTH = 24  # characters of the bar


class Transfer:
    """Shows `done` of `total` bytes. Bytes that an earlier call had done already do not count into the speed."""

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        self.what, self.total, self.done, self._skipped = what, total, 0, 0
        self.stream = sys.stdout if stream is None else stream
        self._live = self.stream.isatty()
        self._began = self._shown = time.monotonic()

    def skip(self, nbytes: int) -> None:
        self._skipped += nbytes
        self.add(nbytes)

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        if time.monotonic() - self._shown >= EVERY_S[self._live]:
            self._show("\r\x1b[K" if self._live else "", "" if self._live else "\n")

    def finish(self) -> None:
        self._show("\r\x1b[K" if self._live else "", "\n")

    def _show(self, before: str, after: str) -> None:
        self._shown = time.monotonic()
        self.stream.write(before + self.text() + after)
        self.stream.flush()

    def text(self) -> str:
        share = self.done / max(1, self.total)
        bar = "#" * round(WIDTH * share)
        speed = (self.done - self._skipped) / max(1e-9, time.monotonic() - self._began)
        left = duration((self.total - self.done) / speed) if speed else "?"
        return (
            f"{self.what} [{bar:.<{WIDTH}}] {self.done / 2**30:.2f}/{self.total / 2**30:.2f} GiB  {speed / 1e6:.0f} "
            f"MB/s  {left} left"
        )
