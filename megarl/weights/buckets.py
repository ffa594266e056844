"""How tensors are put into buckets of bounded size: messages of a sync, files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
IN_FLIGHT = 2  # of one sender in a sync: one is packed while the one before travels


def fill_buckets(sized: Iterable[tuple[T, Any]], limit: int) -> Iterator[list[T]]:
    """The items in order, in buckets whose sizes sum to at most `limit`; an item that is larger has one to itself.

    sized: (item, size). A size is an int, or int64 [ranks] where the limit holds for each rank.
    """
    bucket: list[T] = []
    filled: Any = 0
    for item, size in sized:
        together = filled + size
        if bucket and (together.max() if isinstance(together, np.ndarray) else together) > limit:
            yield bucket
            bucket, together = [], size
        bucket.append(item)
        filled = together
    if bucket:
        yield bucket
