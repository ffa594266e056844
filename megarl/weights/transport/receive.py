"""A rollout rank's part in a weight sync: buckets in their order, each message into a buffer of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from megarl.weights.transport.groups import WeightGroup, Work
from megarl.weights.transport.shared import SharedGroup


def receive(
    group: WeightGroup | SharedGroup,
    sources: Sequence[Sequence[int | None]],
    buffers: Callable[[int], list[Tensor]],
) -> Iterator[list[Tensor]]:
    """The buffers of one bucket after the other, filled; the next bucket is on its way meanwhile.

    sources: of each bucket the group rank that each of its messages comes from; None for a broadcast's. buffers: those
    of a bucket, in the order of its messages. RuntimeError where a sender is gone or late.
    """

    def begin(number: int) -> tuple[list[Tensor], list[Work]]:
        into = buffers(number)
        named = list(zip(into, sources[number], strict=True))
        single = [(buffer, source) for buffer, source in named if source is not None]
        works: list[Work] = [group.broadcast(buffer) for buffer, source in named if source is None]
        return into, [*works, *(group.exchange([], single, number) if single else [])]

    ahead = begin(0)
    for number in range(len(sources)):
        filled, works = ahead
        if number + 1 < len(sources):
            ahead = begin(number + 1)
        for work in works:
            work.wait()
        yield filled
