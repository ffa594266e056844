"""The rollout workers as the trainer sees them: found through the run's store, asked by ingest ranks, refitted by rank 0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.config import Config
from megarl.errors import UserError
from megarl.rollout.client import RolloutClient, RolloutError
from megarl.rollout.coordinator import WorkerInfo, check_workers, open_store, request_shutdown, wait_for_workers
from megarl.rollout.sync import BroadcastSync, SyncReport


class Fleet:
    """Rank 0 owns the store and the weight group; every ingest rank has a client and reads the store. Other ranks hold an empty one."""

    def __init__(self, config: Config, device: torch.device, *, is_ingest: bool) -> None:
        """Collective: waits, on rank 0, until rollout.engines workers have registered; raises UserError, named, if they do not."""
        host, _, port = config.launch.store.rpartition(":")
        if port in ("", "0"):
            raise UserError(f"launch.store {config.launch.store!r} has no port; `megarl run` chooses one, else give host:port")
        self._store: Any = None
        self._sync: BroadcastSync | None = None
        self._workers: list[WorkerInfo] = []
        main = dist.get_rank() == 0
        if main:
            self._store = open_store(host, int(port), is_master=True, timeout_s=config.rollout.start_timeout_s)
            self._workers = wait_for_workers(self._store, config.rollout.engines, config.rollout.start_timeout_s)
        told = [self._workers]
        dist.broadcast_object_list(told, src=0)
        self._workers = told[0]
        self.urls = [worker.url for worker in self._workers]
        if is_ingest and not main:
            self._store = open_store(host, int(port), is_master=False, timeout_s=config.rollout.start_timeout_s)
        self.client = RolloutClient(self.urls, config.rollout.request_timeout_s) if is_ingest or main else None
        if main:
            self._sync = BroadcastSync(host, int(port), config.sync.timeout_s)
            self._sync.connect(self._store, self._workers, device)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns a broken connection into the worker's own account of its death, where it left one."""
        try:
            yield
        except RolloutError:
            if self._store is not None:
                check_workers(self._store, self._workers, wait_s=5.0)
            raise

    def check(self) -> None:
        """Raises RolloutDied, on an ingest rank, if a worker failed or fell silent. Cheap."""
        if self._store is not None:
            check_workers(self._store, self._workers)

    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        assert self._sync is not None
        with self.watched():
            return self._sync.push(tensors, version)

    def score(self, tokens: list[int]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """The canary from every server: (log-probabilities [T-1], routes [T-1, L, K])."""
        assert self.client is not None
        with self.watched():
            return [self.client.score(tokens, server) for server in range(len(self.urls))]

    def close(self) -> None:
        """Ends the workers of this run, rank 0; safe to call after a failure."""
        if self.client is not None:
            self.client.close()
        if self._sync is not None:
            self._sync.close()
            request_shutdown(self._store, self._workers)
