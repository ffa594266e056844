"""Reading while what was read before is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(makes: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each gives, in order, made one after the other by a thread; one is made while the one before is used."""
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, "read") as pool:
        for make in makes:
            pending.append(pool.submit(make))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
