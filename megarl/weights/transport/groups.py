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

SENDER = 0  # of a broadcast


class Work(Protocol):
    def wait(self) -> Any: ...


class WeightGroup:
    """Broadcast and point-to-point over gloo, or over NCCL when `device` is CUDA (that branch has never been run)."""

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
        self.device = device
        self._group: Any
        if device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, world_size, nccl)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, world_size, timeout)

    def broadcast(self, buffer: Tensor) -> dist.Work:
        """Starts to send (rank 0) or receive (the others) a contiguous
        buffer; the work's wait() ends within `timeout_s`.
        """
        return self._open().broadcast(buffer, SENDER)

    def exchange(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], tag: int
    ) -> list[dist.Work]:
        """Starts to send contiguous buffers to ranks and to fill others
        from ranks; NCCL runs them as one group of operations.

        Messages between two ranks arrive in order; `tag` numbers the bucket.
        """
        grouped, group = self.device.type == "cuda" and bool(sends or receives), self._open()
        if grouped:
            group._start_coalescing(self.device)
        works = [group.send([buffer], rank, tag) for buffer, rank in sends]
        works += [group.recv([buffer], rank, tag) for buffer, rank in receives]
        return [group._end_coalescing(self.device)] if grouped else works

    def _open(self) -> Any:
        group = self._group  # another thread may close it: a server that fails ends what is being sent
        if group is None:
            raise RuntimeError("the weight group was closed")
        return group

    def close(self) -> None:
        """Leaves the group without waiting for the others; what is pending fails, here and at the other end."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()
