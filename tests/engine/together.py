"""Run by test_vllm_faults.py: how many requests an idle engine takes before its first step, of those that come one
after the other and of a batch that comes slowly, and after how many of an endless stream it begins, with vLLM's own
input queue and our servers' patch of it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from types import SimpleNamespace
from typing import Any

from megarl.server.arrivals import name_of
from megarl.server.plugin import OWN_SERVER

REQUESTS = 40


class Engine:
    """As much of vLLM's engine as its input queue looks at."""

    process_input_queue_block = True

    def __init__(self, at_work: bool, kept: int) -> None:
        self.taken, self.at_work, self.scheduler = 0, at_work, SimpleNamespace(requests=dict[str, None]())
        for number in range(kept):  # those that a weight sync has paused
            self.scheduler.requests[f"0_{name_of(0, REQUESTS, number)}-1f"] = None
        self.input_queue, self.aborts_queue = queue.Queue[Any](), queue.Queue[Any]()

    def has_work(self) -> bool:
        return self.at_work or bool(self.taken)

    def is_running(self) -> bool:
        return True

    def _notify_idle_state_callbacks(self) -> None: ...

    def _handle_client_request(self, *request: Any) -> None:
        self.taken += 1
        self.scheduler.requests[request[1]] = None


def taken(at_work: bool, endless: bool = False, size: int = 1, apart_s: float = 0.0002, kept: int = 0) -> int:
    """size: of the batch, as the names of its requests tell it; kept: how many the paused engine had before."""
    from vllm.v1.engine.core import EngineCoreProc

    engine, ended = Engine(at_work, kept), threading.Event()

    def send() -> None:
        sent = 0
        while not ended.is_set() and (endless or sent < REQUESTS):
            engine.input_queue.put(("add", f"0_{name_of(sent // size, size, sent)}-1f"))
            sent += 1
            time.sleep(apart_s)

    sender = threading.Thread(target=send)
    sender.start()
    EngineCoreProc._process_input_queue(engine)  # type: ignore[arg-type]
    count = engine.taken
    ended.set()
    sender.join()
    return count


def main() -> None:
    os.environ[OWN_SERVER] = "1"
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from megarl.server import vllm_patches

    vllm_patches.APART_S, vllm_patches.TOGETHER_S = 0.2, 2.0  # a machine that stands still between two of them
    batch, busy = taken(at_work=False), taken(at_work=True)
    assert taken(at_work=False, endless=True) > 1  # returns
    vllm_patches.APART_S, vllm_patches.TOGETHER_S = 0.001, 60.0
    slow = taken(at_work=False, size=REQUESTS, apart_s=0.02)
    assert taken(at_work=False, size=REQUESTS, apart_s=0.02, kept=3) < REQUESTS  # what was kept goes on at once
    vllm_patches.TOGETHER_S = 0.2
    assert taken(at_work=False, size=2 * REQUESTS) == REQUESTS  # returns though one is never whole
    print(f"\nbatch={batch} slow={slow} busy={busy}")


if __name__ == "__main__":
    main()
