"""Whether a vLLM server of ours still answers, its engine included: what a worker's beats stand for."""

from __future__ import annotations

import json
import threading
import time
import urllib.request

from megarl.door import header
from megarl.rollout.registry import BEAT_S, WorkerInfo

ALIVE = "/megarl/alive"
PROBE_S = 5.0  # of one question; an engine answers between two of its steps


class Probe:
    """Asks every BEAT_S, in a thread. running: requests that were at work in the server at its last answer."""

    def __init__(self, info: WorkerInfo) -> None:
        self.running = 0
        self._request = urllib.request.Request(info.url + ALIVE, headers=header(info.tokens.control))
        self._answered, self._over = time.monotonic(), threading.Event()
        threading.Thread(target=self._ask, name="probe", daemon=True).start()

    @property
    def silent_s(self) -> float:
        """Since the last answer."""
        return time.monotonic() - self._answered

    def close(self) -> None:
        self._over.set()

    def _ask(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                with urllib.request.urlopen(self._request, timeout=PROBE_S) as answer:
                    self.running = int(json.loads(answer.read())["running"])
                self._answered = time.monotonic()
            except (OSError, ValueError):  # HTTPError is an OSError
                continue


def healthy(url: str) -> bool:
    """Whether a server that is being started has come up."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
