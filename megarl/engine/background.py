"""A checkpoint's tensors on their way to disk: copied to host memory, then written by a thread while the rank goes on.

megarl's own threads and group do what megatron-core's asynchronous save does with forked processes at a later step: a
fork of a process with gloo's or CUDA's threads may hang, and a checkpoint is whole as soon as it is written.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megarl.engine.megatron_compat import own_asynchronous_save

FORMAT = ("torch_dist", 1)
# Beside groups, whose waits are bounded by what they wait for: a rank that has written waits for the one whose share of
# the disk is the slowest. Where that one hangs the stall watch ends the run.
WRITERS_TIMEOUT = timedelta(days=7)
FILES_A_RANK = 2  # on every release of megatron-core: its own default went from two to one
_group: tuple[Any, Any] = (None, None)  # the world, and the writers' group in it


class _Planned(TorchDistSaveShardedStrategy):
    """megatron-core's plan and files; who writes them, and when, is ours."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *chosen: str) -> AsyncRequest:
        self.writer, self.metadata, _ = planned
        return AsyncRequest(None, (), [])


@dataclass
class Parts:
    """This rank's share of one folder of a checkpoint, in host memory."""

    folder: Path
    writer: filesystem_async.FileSystemWriterAsync
    metadata: Metadata | None  # of all ranks' shares, on rank 0
    buckets: list[filesystem_async.WriteBucket]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, _, (_, tensors) in self.buckets for _, tensor in tensors)

    def write(self) -> list[WriteResult]:
        """Raises what the disk says."""
        transforms = [self.writer.transforms] if hasattr(self.writer, "transforms") else []
        write = filesystem_async.FileSystemWriterAsync.write_preloaded_data.__wrapped__  # it turns the collector off
        done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        count: queue.Queue[int] = queue.Queue()
        results: list[WriteResult] = []
        for bucket in self.buckets:
            count.put(0)
            write(transforms, 0, bucket, done, count, True)
            _, written = done.get_nowait()
            if isinstance(written, Exception):
                raise written
            results += written
        return results

    def finish(self, results: list[list[WriteResult]]) -> None:
        """On rank 0, with the results of all ranks: the folder can be read."""
        assert self.metadata is not None
        self.writer.finish(self.metadata, results)
        save_config(CheckpointingConfig(*FORMAT), str(self.folder))


def copied(sharded: dict[str, Any], folder: Path) -> Parts:
    """Copies what this rank is to write of `sharded` into `folder`: it may change from here on. Collective."""
    filesystem_async._results_queue = queue.SimpleQueue()  # else megatron-core starts a process for it
    strategy = _Planned(*FORMAT, thread_count=FILES_A_RANK)
    dist_checkpointing.save(
        sharded, str(folder), sharded_strategy=strategy, async_sharded_save=True, **own_asynchronous_save()
    )
    buckets = [
        (path, name, (data, [(item, tensor.detach().to("cpu", copy=True)) for item, tensor in tensors]))
        for path, name, (data, tensors) in strategy.writer.write_buckets
    ]
    strategy.writer.write_buckets = None
    return Parts(folder, strategy.writer, strategy.metadata, buckets)


def writers_group() -> dist.ProcessGroup:
    """A gloo group of all ranks for the threads that write; the rank itself uses the others meanwhile. Collective."""
    global _group
    if _group[0] is not dist.group.WORLD:
        _group = dist.group.WORLD, dist.new_group(backend="gloo", timeout=WRITERS_TIMEOUT)
    return _group[1]


class Background:
    """Runs `work(group)` in a thread. finish() waits for it and raises what it raised. within_s: what it may take."""

    def __init__(self, work: Callable[[dist.ProcessGroup], None], group: dist.ProcessGroup, within_s: float) -> None:
        self.within_s = within_s
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=[work, group], name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def wait(self, seconds: float) -> None:
        """For so long, or until the work has ended, well or not."""
        self._thread.join(seconds)

    def finish(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, work: Callable[[dist.ProcessGroup], None], group: dist.ProcessGroup) -> None:
        try:
            work(group)
        except BaseException as error:  # torch's CheckpointException is no Exception
            self._error = error
