"""A rollout worker's connection to the run's store, by calls that end.

c10d waits for the store's answer as long as TCP does, a quarter of an hour and more where a link is cut, and hears no
signal meanwhile. So each call runs in a thread of its own, and the caller gives up.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist

from megarl.addresses import resolve
from megarl.errors import UserError
from megarl.rollout import registry

CALL_S = 20.0  # a call that took longer is given up, and with it the connection
OPEN_S = 5.0


class StoreLost(Exception):
    """The store is gone, or does not answer. One line."""


class StoreLink:
    """Closed at first, and again after a StoreLost."""

    def __init__(self, host: str, port: int, interface: str | None = None) -> None:
        self.host, self.port, self._interface = host, port, interface
        self._store: dist.TCPStore | None = None

    def connect(self) -> bool:
        """Whether the store answers."""
        try:
            address = resolve(self.host, self._interface)
            socket.create_connection((address, self.port), timeout=2).close()
            self._store = bounded(OPEN_S + 1, registry.open_store, address, self.port, False, OPEN_S)
        except (OSError, UserError, TimeoutError):
            return False
        return True

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(store, *args). Raises StoreLost."""
        return self.call_within(CALL_S, function, *args)

    def call_within(self, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        where = f"the run's store {self.host}:{self.port}"
        if self._store is None:
            raise StoreLost(f"{where} is not open")
        try:
            return bounded(seconds, function, self._store, *args)
        except dist.DistError:
            self.close()
            raise StoreLost(f"{where} is gone") from None
        except TimeoutError:
            self.close()
            raise StoreLost(f"{where} has not answered for {seconds:.0f} s") from None

    def close(self) -> None:
        self._store = None  # a call that still waits keeps its own hold


def bounded(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
    """What function(*args) returns or raises; TimeoutError where that takes longer, and then it goes on alone."""
    done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            done.put((function(*args), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result
