"""The process group that weights travel by: one sender (rank 0) and the rollout workers, apart from every other group.

It needs no default process group, so that it works inside a vLLM worker and inside a torchrun rank alike.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SENDER = 0


class WeightGroup:
    """A broadcast group over gloo, or over NCCL when `device` is CUDA (that branch has never been run)."""

    def __init__(self, store: dist.Store, name: str, rank: int, world_size: int, timeout_s: float, device: torch.device) -> None:
        """Meets the other ranks in `store` under `name`, which must be fresh. gloo listens where GLOO_SOCKET_IFNAME says.

        Raises RuntimeError when the others have not come within `timeout_s`.
        """
        timeout = timedelta(seconds=timeout_s)
        meeting = dist.PrefixStore(f"weights/{name}", store)
        meeting.set_timeout(timeout)
        self._group: Any
        if device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            self._group = dist.ProcessGroupNCCL(meeting, rank, world_size, nccl)
        else:
            self._group = dist.ProcessGroupGloo(meeting, rank, world_size, timeout)

    def broadcast(self, buffer: torch.Tensor) -> dist.Work:
        """Starts to send (rank 0) or receive (the others) a contiguous buffer; the work's wait() ends within `timeout_s`."""
        return self._group.broadcast(buffer, SENDER)

    def close(self) -> None:
        """Leaves the group without waiting for the others; a pending broadcast fails."""
        if self._group is not None:
            self._group.abort()
            self._group = None
