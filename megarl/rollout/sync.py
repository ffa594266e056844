"""The sending end of a weight sync: full tensors, by broadcast, into every rollout server at once, between two rollouts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megarl.rollout.client import RolloutError, Server
from megarl.rollout.coordinator import WorkerInfo
from megarl.weights.pack import Bucket, buckets
from megarl.weights.transport import WeightGroup

BUCKET_BYTES = 256 * 2**20


@dataclass
class SyncReport:
    seconds: float
    bytes: int
    tensors: int


class BroadcastSync:
    """Held by one trainer rank, the sender. One that raised is spent: connect a new one."""

    def __init__(self, store_host: str, store_port: int, timeout_s: float, bucket_bytes: int = BUCKET_BYTES) -> None:
        """`store_host`, `store_port`: the run's store. `timeout_s` bounds connect and every push."""
        self._store_host, self._store_port = store_host, store_port
        self._timeout_s, self._bucket_bytes = timeout_s, bucket_bytes
        self._servers: list[Server] = []
        self._group: WeightGroup | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._deadline = 0.0

    def connect(self, store: dist.Store, workers: list[WorkerInfo], device: torch.device) -> None:
        """Makes the group of this rank (0) and all ranks of `workers`. `store`: a client or the master of the run's store."""
        self._servers = [Server(worker.url, self._timeout_s) for worker in workers]
        self._pool = ThreadPoolExecutor(len(workers) + 1, "weight-sync")
        self._deadline = time.monotonic() + self._timeout_s
        name = uuid.uuid4().hex
        meeting: dict[str, Any] = {
            "store_host": self._store_host,
            "store_port": self._store_port,
            "group": name,
            "world_size": 1 + sum(worker.tp for worker in workers),
            "timeout_s": self._timeout_s,
        }
        offsets = [1 + sum(worker.tp for worker in workers[:i]) for i in range(len(workers))]
        posts = self._post_all("init", [{**meeting, "rank_offset": offset} for offset in offsets])
        group = self._pool.submit(WeightGroup, store, name, 0, meeting["world_size"], self._timeout_s, device)
        self._await([*posts, group], None)
        self._group = group.result()

    def push(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        """Loads `tensors` (Hugging Face names, full shapes) into every server and sets their weight version; drops their prefix caches.

        Raises RolloutError, one line that names the server and, where bytes differ, the tensor. Ends within timeout_s.
        """
        start = time.monotonic()
        self._deadline = start + self._timeout_s
        report = SyncReport(0.0, 0, 0)
        self._await(self._post_all("start", {}), None)
        for bucket in buckets(tensors, self._bucket_bytes):
            self._send(bucket)
            report.bytes += bucket.buffer.numel()
            report.tensors += len(bucket.names)
        self._await(self._post_all("finish", {"version": version}), None)
        report.seconds = time.monotonic() - start
        return report

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
        for server in self._servers:
            server.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _send(self, bucket: Bucket) -> None:
        assert self._group is not None, "connect() first"
        posts = self._post_all("update", bucket.header())
        self._await(posts, self._group.broadcast(bucket.buffer))

    def _post_all(self, step: str, bodies: dict[str, Any] | list[dict[str, Any]]) -> list[Future[bytes]]:
        assert self._pool is not None, "connect() first"
        if isinstance(bodies, dict):
            bodies = [bodies] * len(self._servers)
        left = max(self._deadline - time.monotonic(), 0.1)
        return [self._pool.submit(server.post, f"/megarl/sync/{step}", body, left) for server, body in zip(self._servers, bodies)]

    def _await(self, posts: Sequence[Future[Any]], work: dist.Work | None) -> None:
        """Waits for all servers, and no longer than the first failure: a server that failed would never join the broadcast."""
        done, pending = wait(posts, max(self._deadline - time.monotonic(), 0), return_when=FIRST_EXCEPTION)
        for post in done:
            if error := post.exception():
                self.close()
                raise error
        if pending:
            self.close()
            late = ", ".join(server.url for server, post in zip(self._servers, posts) if post in pending)
            raise RolloutError(f"weight sync: no answer within {self._timeout_s:.0f} s from rollout server {late or '(group)'}")
        if work is not None:
            work.wait()
