"""The rollout workers as the trainer sees them: found through the run's store, asked by ingest ranks, refitted by rank
0.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist

from megarl.addresses import host_and_port, spans_hosts
from megarl.config import Config
from megarl.rollout.client import RolloutClient
from megarl.rollout.registry import (
    RolloutError,
    WorkerInfo,
    check_workers,
    open_store,
    request_shutdown,
    wait_for_workers,
)
from megarl.rollout.store import open_run_store
from megarl.rollout.sync_leader import Canary, InFlight, SyncLeader, SyncSettings
from megarl.rollout.wire import ENGINE_DIED
from megarl.weights.transport.send import Outgoing, WeightSender


class Fleet:
    """Rank 0 owns the store and leads the syncs; every ingest rank has
    a client and reads the store; senders are in the weight group.
    """

    def __init__(self, config: Config, device: torch.device, *, is_ingest: bool) -> None:
        """Collective: waits, on rank 0, until rollout.engines workers
        have registered; raises UserError, named, if they do not.
        """
        self._store: Any = None
        self._leader: SyncLeader | None = None
        self._sender: WeightSender | None = None
        self.workers: list[WorkerInfo] = []
        self._device = device
        main, where = dist.get_rank() == 0, ("", 0)
        if main:
            self._store, where = open_run_store(config, spans_hosts=spans_hosts())
            self.workers = wait_for_workers(self._store, config.rollout.engines, config.rollout.start_timeout_s)
        told: list[Any] = [self.workers, where]
        dist.broadcast_object_list(told, src=0)
        self.workers, self._address = told
        self.urls = [worker.url for worker in self.workers]
        if is_ingest and not main:
            host, port = self._address
            self._store = open_store(host, port, is_master=False, timeout_s=config.rollout.start_timeout_s)
        self.client: RolloutClient | None = None
        if is_ingest or main:
            timeout_s, at_once = config.rollout.request_timeout_s, config.rollout.max_num_seqs
            self.client = RolloutClient(self.workers, timeout_s, at_once=at_once)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns a broken connection into the worker's own account of its death, where it left one."""
        try:
            yield
        except RolloutError as error:
            if self._store is not None:
                check_workers(self._store, self.workers, wait_s=60.0 if ENGINE_DIED in str(error) else 5.0)
            raise

    def check(self) -> None:
        """Raises RolloutDied, on an ingest rank, if a worker failed or fell silent. Cheap."""
        if self._store is not None:
            check_workers(self._store, self.workers)

    def connect(self, settings: SyncSettings, manifest_inputs: dict[str, Any], remember_disk: bool) -> None:
        """Collective: the group that weights travel by. See SyncLeader.init; of manifest_inputs only rank 0's count."""
        rank = dist.get_rank()
        names = [uuid.uuid4().hex]
        dist.broadcast_object_list(names, src=0)
        (name,) = names
        if rank >= settings.senders:
            return
        host, port = self._address
        store = self._store or open_store(host, port, is_master=False, timeout_s=settings.timeout_s)
        world = settings.senders + sum(worker.tp for worker in self.workers)

        def join() -> WeightSender:
            return WeightSender(store, name, rank, world, settings.timeout_s, self._device, settings.shared)

        if rank == 0:
            self._leader = SyncLeader(self.workers, host, port, settings)
            with self.watched():
                self._sender = self._leader.init(name, manifest_inputs, join, remember_disk)
        else:
            self._sender = join()

    def push(self, buckets: Iterable[Outgoing], canary: list[int], in_flight: InFlight | None = None) -> list[Canary]:
        """Sends this rank's buckets. Rank 0: returns every server's score
        of the canary, once all have loaded; they do not serve yet.

        Elsewhere a send that fails is left to rank 0, which knows more and ends the run; an empty list is returned.
        """
        sender = self._sender
        if self._leader is not None and sender is not None:
            with self.watched():
                return self._leader.push(lambda: sender.send(buckets), canary, sender.close, in_flight)
        if sender is None:
            for _ in buckets:
                pass
            return []
        try:
            sender.send(buckets)
        except RuntimeError as error:
            print(
                f"megarl: trainer rank {dist.get_rank()}: sending weights failed: {' '.join(str(error).split())}",
                file=sys.stderr,
            )
            sender.close()
        return []

    def check_digests(self, folder: str | None) -> None:
        if self._leader is not None:
            with self.watched():
                self._leader.check(folder)

    @property
    def push_seconds(self) -> dict[str, float]:
        """Where the last push took its time, on rank 0."""
        return self._leader.seconds if self._leader is not None else {}

    def commit(self, version: int) -> None:
        """Every server serves again, under this version."""
        if self._leader is not None:
            with self.watched():
                self._leader.commit(version)

    def turn(self, step: Literal["sleep", "wake"]) -> None:
        """Collective: every server sleeps, or is awake, when this returns. After the first sync.

        Whoever asks has done its part before: on every rank the memory
        that a server takes is free, and no ingest rank asks it for more.
        """
        dist.barrier()
        if self._leader is not None:
            with self.watched():
                self._leader.turn(step)
        dist.barrier()

    def close(self) -> None:
        """Ends the workers of this run, rank 0; safe to call after a failure."""
        if self.client is not None:
            self.client.close()
        if self._sender is not None:
            self._sender.close()
        if self._leader is not None:
            self._leader.close()
        if self._store is not None and dist.get_rank() == 0:
            request_shutdown(self._store, self.workers)


class JoinedFleet(Fleet):
    """Workers that belong to somebody else, who is the store's master:
    for tools that sync from one set of ranks after another.
    """

    def __init__(self, config: Config, device: torch.device, workers: list[WorkerInfo]) -> None:
        host, port = host_and_port(config.launch.store)
        self._store: Any = open_store(host, port, is_master=False, timeout_s=config.sync.timeout_s)
        self._leader: SyncLeader | None = None
        self._sender: WeightSender | None = None
        self._device, self._address = device, (host, port)
        self.workers, self.urls = workers, [worker.url for worker in workers]
        self.client = None

    def close(self) -> None:
        """Lets go of the workers, which go on."""
        if self._sender is not None:
            self._sender.close()
        if self._leader is not None:
            self._leader.close()
