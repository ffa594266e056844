"""A trainer rank's part in a weight sync: buckets of packed messages into the group that weights travel by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.weights.buckets import IN_FLIGHT
from megarl.weights.transport.groups import WeightGroup, Work
from megarl.weights.transport.shared import SharedGroup


@dataclass
class Outgoing:
    """One bucket of one sender: messages (uint8) and the group ranks they go to; a broadcast goes to all (None).
    number: of the bucket.
    """

    messages: Sequence[tuple[Tensor, int | None]]
    number: int = 0


class WeightSender:
    """This rank's place in the group. One that raised is spent."""

    def __init__(
        self,
        store: dist.Store,
        name: str,
        rank: int,
        world: int,
        timeout_s: float,
        device: torch.device,
        shared: bool = False,
    ) -> None:
        """shared: through memory that both ends see, instead of a process group (megarl/weights/transport/shared.py).

        Raises RuntimeError when the others have not come within `timeout_s`, which bounds every send as well.
        """
        self._group = (SharedGroup if shared else WeightGroup)(store, name, rank, world, timeout_s, device)

    def send(self, buckets: Iterable[Outgoing]) -> None:
        """Sends all buckets. When the next one is asked for, at most
        IN_FLIGHT - 1 are still on their way: a ring of buffers will do.
        """
        pending: list[list[Work]] = []
        for bucket in buckets:
            single = [(buffer, rank) for buffer, rank in bucket.messages if rank is not None]
            works: list[Work] = [self._group.broadcast(buffer) for buffer, rank in bucket.messages if rank is None]
            pending.append([*works, *(self._group.exchange(single, [], bucket.number) if single else [])])
            if len(pending) == IN_FLIGHT:
                _wait(pending.pop(0))
        for works in pending:
            _wait(works)

    def close(self) -> None:
        """A pending send fails, here and at the other end."""
        self._group.close()


def _wait(works: list[Work]) -> None:
    for work in works:
        work.wait()
