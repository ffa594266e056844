"""Where trainers and rollout workers meet: the run's c10d store.

Keys: rollout/count, rollout/<i>/info, rollout/<i>/beat (a counter), rollout/<i>/failed (one line and the log's tail),
rollout/<i>/gone,
rollout/shutdown. Every call here is bounded in time.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch.distributed as dist

from megarl.announce import announce, plural
from megarl.errors import UserError

BEAT_S = 1.0
STALE_S = 15.0  # a worker that has not beaten for so long is taken for dead


class RolloutDied(UserError):
    """A rollout worker failed, or fell silent. The message's first line says which; the log's last lines follow."""


@dataclass
class WorkerInfo:
    """One registered vLLM server. `index` numbers workers in the order they came."""

    index: int
    url: str  # http://host:port
    tp: int
    pid: int
    host: str
    log: str
    beat: int = field(default=-1, compare=False)
    seen_at: float = field(default=0.0, compare=False)  # this process's monotonic clock, seconds


def open_store(host: str, port: int, is_master: bool, timeout_s: float) -> dist.TCPStore:
    """The run's store; port 0 lets the master choose (store.port
    tells). Raises UserError when it cannot be opened or reached.
    """
    try:
        return dist.TCPStore(
            host, port, is_master=is_master, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:  # c10d's errors derive from RuntimeError
        if is_master:
            fix = "the port is in use or the host is not this machine: give another launch.store"
        else:
            fix = f"nothing answered within {timeout_s:.0f} s: start the trainers, or correct launch.store"
        raise UserError(f"run store {host}:{port}: {fix} ({' '.join(str(error).split())[:160]})") from None


def claim_index(store: dist.Store) -> int:
    """A number of its own for a worker that is about to start a server; failures can be
    reported under it from here on.
    """
    return store.add("rollout/count", 1) - 1


def register_worker(store: dist.Store, info: WorkerInfo) -> None:
    """Announces a server that answers requests."""
    heartbeat(store, info.index)
    store.set(
        f"rollout/{info.index}/info",
        json.dumps({k: v for k, v in asdict(info).items() if k not in ("beat", "seen_at")}),
    )


def heartbeat(store: dist.Store, index: int) -> None:
    store.add(f"rollout/{index}/beat", 1)


def report_failure(store: dist.Store, index: int, text: str) -> None:
    store.set(f"rollout/{index}/failed", text)


def worker_left(store: dist.Store, index: int) -> None:
    store.set(f"rollout/{index}/gone", "1")


def shutdown_requested(store: dist.Store) -> bool:
    return store.check(["rollout/shutdown"])


def wait_for_workers(store: dist.Store, n: int, timeout_s: float) -> list[WorkerInfo]:
    """The `n` workers that came first. Raises RolloutDied if one fails meanwhile,
    UserError when they do not all come.
    """
    workers: dict[int, WorkerInfo] = {}
    announce(f"waiting for {plural(n, 'rollout server')}")
    deadline = time.monotonic() + timeout_s
    while True:
        for index in range(store.add("rollout/count", 0)):
            _raise_if_failed(store, index)
            if index not in workers and store.check([f"rollout/{index}/info"]):
                workers[index] = WorkerInfo(**json.loads(store.get(f"rollout/{index}/info")))
                announce(f"rollout server {workers[index].url} answers, {len(workers)} of {n}")
        if len(workers) >= n:
            return [workers[index] for index in sorted(workers)][:n]
        if time.monotonic() > deadline:
            raise UserError(
                f"{len(workers)} of {n} rollout workers came within {timeout_s:.0f} s: "
                "start `megarl rollout` with the same launch.store, or raise rollout.start_timeout_s"
            )
        time.sleep(0.1)


def common_tp(workers: list[WorkerInfo]) -> int:
    """rollout.tp of all workers. Raises UserError where it differs: servers may join from other hosts with
    configurations of their own.
    """
    first = workers[0]
    for worker in workers:
        if worker.tp != first.tp:
            raise UserError(
                f"rollout worker {worker.index} ({worker.url}) has rollout.tp {worker.tp}, worker {first.index} "
                f"({first.url}) has "
                f"{first.tp}; start all with the same, or set sync.transport=broadcast"
            )
    return first.tp


def check_workers(store: dist.Store, workers: list[WorkerInfo], wait_s: float = 0.0) -> None:
    """Raises RolloutDied if a worker reported a failure or has been
    silent for STALE_S. Cheap: two store look-ups a worker.

    wait_s: after a broken connection, how long to wait for the worker's own account of it.
    """
    deadline = time.monotonic() + wait_s
    while True:
        for worker in workers:  # before silence, which may be a failure's echo
            _raise_if_failed(store, worker.index)
        for worker in workers:
            beat, now = store.add(f"rollout/{worker.index}/beat", 0), time.monotonic()
            if beat != worker.beat:
                worker.beat, worker.seen_at = beat, now
            elif now - worker.seen_at > STALE_S:
                raise RolloutDied(
                    f"rollout worker {worker.index} ({worker.url}, pid {worker.pid} on {worker.host}) has been silent "
                    "for "
                    f"{now - worker.seen_at:.0f} s; its log is {worker.log}"
                )
        if time.monotonic() >= deadline:
            return
        time.sleep(0.1)


def _raise_if_failed(store: dist.Store, index: int) -> None:
    if store.check([f"rollout/{index}/failed"]):
        raise RolloutDied(store.get(f"rollout/{index}/failed").decode())


def request_shutdown(store: dist.Store, workers: list[WorkerInfo], wait_s: float = 8.0) -> None:
    """Asks every worker to end and waits, at most `wait_s`, until they
    have: the store must outlive them for a clean exit.
    """
    store.set("rollout/shutdown", "1")
    keys = [f"rollout/{worker.index}/gone" for worker in workers]
    deadline = time.monotonic() + wait_s
    while keys and not store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.05)
