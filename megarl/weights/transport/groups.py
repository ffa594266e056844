"""The process group that weights travel by: the sending trainer ranks,
then the rollout workers, apart from every other group.

It needs no default process group, so that it works inside a vLLM worker and inside a torchrun rank alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.weights.transport.nccl import NcclBackend

SENDER = 0  # of a broadcast


class Work(Protocol):
    def wait(self) -> Any: ...


class WeightGroup:
    """Broadcast and point-to-point over gloo, or over NCCL when `device` is CUDA (nccl.py; run with one rank)."""

    def __init__(
        self, store: dist.Store, name: str, rank: int, world_size: int, timeout_s: float, device: torch.device
    ) -> None:
        """Meets the other ranks in `store` under `name`, which must be
        fresh. gloo listens where GLOO_SOCKET_IFNAME says.

        Raises RuntimeError when the others have not come within `timeout_s`.
        """
        timeout = timedelta(seconds=timeout_s)
        store = dist.PrefixStore(f"weights/{name}", store)
        store.set_timeout(timeout)
        self._group: NcclBackend | _Gloo | None
        if device.type == "cuda":
            self._group = NcclBackend(store, rank, world_size, timeout_s, device)
        else:
            self._group = _Gloo(dist.ProcessGroupGloo(store, rank, world_size, timeout))

    def broadcast(self, buffer: Tensor) -> Work:
        """Starts to send (rank 0) or receive (the others) a contiguous
        buffer; the work's wait() ends within `timeout_s`.
        """
        return self._open().broadcast(buffer, SENDER)

    def exchange(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], tag: int
    ) -> Sequence[Work]:
        """Starts to send contiguous buffers to ranks and to fill others
        from ranks; NCCL runs them as one group of operations.

        Messages between two ranks arrive in order; `tag` numbers the bucket.
        """
        return self._open().exchange(sends, receives, tag)

    def _open(self) -> NcclBackend | _Gloo:
        group = self._group  # another thread may close it: a server that fails ends what is being sent
        if group is None:
            raise RuntimeError("the weight group was closed")
        return group

    def close(self) -> None:
        """Leaves the group without waiting for the others; what is pending fails, here and at the other end."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


class _Gloo:
    def __init__(self, group: Any) -> None:
        self._group = group

    def broadcast(self, buffer: Tensor, source: int) -> Work:
        return self._group.broadcast(buffer, source)

    def exchange(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], tag: int
    ) -> list[Work]:
        works = [self._group.send([buffer], rank, tag) for buffer, rank in sends]
        return works + [self._group.recv([buffer], rank, tag) for buffer, rank in receives]

    def abort(self) -> None:
        self._group.abort()
