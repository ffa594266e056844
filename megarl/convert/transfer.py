"""The line of work that is counted in bytes."""

from __future__ import annotations

import time
from typing import TextIO

from megarl.observe.progress import Bar


class Transfer:
    """Shows `done` of `total` bytes. Bytes that an earlier call had done already do not count into the speed."""

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        self.what, self.done, self._skipped = what, 0, 0
        self._bar, self._began = Bar(total, stream), time.monotonic()

    def skip(self, nbytes: int) -> None:
        self._skipped += nbytes
        self.add(nbytes)

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        self._bar.show(self.done, self.text())

    def finish(self) -> None:
        self._bar.close()

    def text(self) -> str:
        speed = (self.done - self._skipped) / max(1e-9, time.monotonic() - self._began)
        sizes = f"{self.done / 2**30:.2f}/{self._bar.total / 2**30:.2f} GiB"
        return f"{self.what} {sizes}  {speed / 1e6:.0f} MB/s  {self._bar.left(self.done, self._skipped)}"
