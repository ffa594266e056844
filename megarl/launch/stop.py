"""Ctrl-C and SIGTERM at a trainer rank: its step ends, or the wait for rollouts does, for a last checkpoint in time.

A rank with nothing to save ends at once. Else the signal is remembered: it cannot end a rank in the middle of an
update, whose peers would wait. Where a rank only waits for the rollout servers (`interruptible`), it raises Stopped;
the others learn of it by what they wait for next.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from megarl.errors import Stopped

# The supervisor of `megarl run` asks by the first: SIGTERM is how torchrun ends the peers of a rank that failed. Who
# starts the ranks by torchrun has the others.
SUPERVISED = (signal.SIGUSR1,)
ALONE = (signal.SIGTERM, signal.SIGINT)
TWICE_S = 1.0  # a signal may reach a rank directly and by torchrun; one that comes later is meant
AGAIN_S = 0.1  # after which a signal that the main thread has not looked at is sent to it once more
_supervised = False


class StopRequest:
    """Takes the signals from its making to close(); outside the main thread, which alone gets them, none.

    unsaved(): whether a step is not in a whole checkpoint yet. asked: the signal that came, or 0.
    """

    def __init__(self, within_s: float, unsaved: Callable[[], bool]) -> None:
        self._unsaved, self.asked = unsaved, 0
        self._within_s, self._may_raise, self._taken = within_s, False, False
        self._before: dict[int, Any] = {}
        self._main = threading.get_ident()
        if threading.current_thread() is not threading.main_thread():
            return
        # a handler in Python waits for the main thread, which may be in a collective for good; this thread does not
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=[reader], daemon=True).start()
        self._before = {number: signal.signal(number, self._take) for number in (SUPERVISED if _supervised else ALONE)}

    def close(self) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._before_fd)
            os.close(self._writer)
        self._before = {}

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Stopped, at once, when a signal comes or has come."""
        self._may_raise = True
        try:
            if self.asked:
                raise Stopped(self.asked)
            yield
        finally:
            self._may_raise = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.asked, self._taken = self.asked or number, True
        if self._may_raise:
            self._may_raise = False  # or a second signal, before interruptible() has ended, would keep it so
            raise Stopped(number)

    def _listen(self, reader: int) -> None:
        """Ends the process where nothing is to be saved, at a second signal, and when the time is over."""
        first, deadline, again, own = 0.0, None, None, 0
        signals = select.poll()  # select() takes no file above 1023, and groups of many ranks hold more than that open
        signals.register(reader, select.POLLIN)
        while True:
            until = again or deadline
            left_ms = None if until is None else max(0.0, until - time.monotonic()) * 1000
            if not signals.poll(left_ms):
                if again is not None:
                    again = None
                    if not self._taken:  # it came just before the main thread began to sleep, which it did not end
                        own += 1
                        signal.pthread_kill(self._main, self.asked)
                    continue
                print(f"no checkpoint within run.preempt_s {self._within_s:g}: ending without", file=sys.stderr)
                leave(128 + self.asked)
            came = os.read(reader, 1)
            if not came:
                os.close(reader)
                return
            if came[0] not in self._before:
                continue
            if own and came[0] == self.asked:  # the one sent above, however late it is: no second one
                own -= 1
                continue
            now = time.monotonic()
            if not self._unsaved() or (deadline and now - first > TWICE_S):
                leave(128 + came[0])
            if deadline is None:
                self.asked, first, deadline = came[0], now, now + self._within_s
                again = min(now + AGAIN_S, deadline)


def supervised() -> None:
    """Says that `megarl run` is above this process. Its signal ends this one, until a StopRequest takes it."""
    global _supervised
    _supervised = True
    signal.signal(signal.SIGUSR1, lambda number, frame: leave(128 + number))


def leave(status: int) -> NoReturn:
    """Ends this process now, whatever its threads wait for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
