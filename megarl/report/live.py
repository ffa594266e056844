"""report.html while its run goes on: made anew from time to time, beside the training and never instead of it."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from megarl.observe.metrics import METRICS_FILE
from megarl.report.html import load_runs, write_page
from megarl.report.verdict import judge

EVERY_S = 60.0
SHARE = 0.01  # of the time at most goes into pages: making them shares rank 0's interpreter with the training


class LivePage:
    """On rank 0. No error of a page ends a run: it is said once, and there are no pages from then on."""

    def __init__(self, run_dir: Path, every_s: float = EVERY_S) -> None:
        self.path = run_dir / "report.html"
        self._every_s = every_s
        self._due = time.monotonic()
        self._thread: threading.Thread | None = None
        self._failed = False

    def refresh(self) -> None:
        """After a step: starts a page in a thread of its own, if one is due and none is being made."""
        if self._failed or time.monotonic() < self._due or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._make, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the page that is being made, if any, is there."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """At the end of the run: the last page, and the verdict for the terminal."""
        self.wait()
        if self._make():
            (run,) = load_runs([str(self.path.parent)])
            print("\n".join([*judge(run.rows, run.precision).lines, f"report: {self.path}"]), flush=True)

    def _make(self) -> bool:
        """Whether the page was written."""
        if self._failed:
            return False
        start = time.monotonic()
        try:
            write_page(self.path, load_runs([str(self.path.parent)]))
        except Exception as error:
            self._failed = True
            print(f"{self.path} could not be made: {error}", file=sys.stderr, flush=True)
        now = time.monotonic()
        self._due = now + max(self._every_s, (now - start) / SHARE)
        return not self._failed


def page_of_a_run_that_ended(run_dir: str) -> None:
    """A page of all that was written, where the run itself could not make its last one: it failed or was stopped."""
    rows, page = Path(run_dir) / METRICS_FILE, Path(run_dir) / "report.html"
    if rows.is_file() and rows.stat().st_size and (not page.is_file() or page.stat().st_mtime < rows.stat().st_mtime):
        LivePage(Path(run_dir)).close()
