"""Where trainers and rollout workers meet: the run's c10d store.

Keys: run/open, run/strangers/<i>, run/refused/<i>; rollout/<i>/info, rollout/<i>/beat (another each time),
rollout/<i>/failed (one line and the log's tail), rollout/<i>/again (and it is started again), rollout/<i>/leaving,
rollout/<i>/gone, rollout/shutdown; rollout/news is another after all that is told of workers. Each <i> that is taken
has a key <i>/claimed. A number is of one start of one server: a worker that starts its server again, or lost the store,
comes under a new one.

What is read may be a stranger's (door.py), so no key is added to: c10d closes the connection of whoever adds to what is
no number.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megarl.addresses import listen_at
from megarl.announce import announce, plural
from megarl.door import Tokens, run_secret, server_tokens, signed, verified
from megarl.errors import UserError

OPEN = "run/open"  # rank 0's signed word that this store is a run's
WORKERS, NEWS = "rollout", "rollout/news"
REFUSED = "run/refused"  # those that did not fit, and why
STRANGERS = "run/strangers"  # workers that came with another MEGARL_TOKEN
BEAT_S = 1.0
BACK_S = 30.0  # servers that lost their trainers come back together: who comes so long after the last joins at a sync


class RolloutError(UserError):
    """A rollout server refused a request, or the connection to it broke. One line that names the server."""


class ServerLost(RolloutError):
    """The connection to a server broke, it did not answer in time, or its engine died: another may be asked."""


class ServerSilent(ServerLost):
    """It did not answer in time."""


class NoServers(RolloutError):
    """No server is left that could be asked."""


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
    tokens: Tokens = field(default=Tokens("", ""), compare=False)
    back: bool = field(default=False, compare=False)  # it served trainers that are gone


def open_store(
    host: str, port: int, is_master: bool, timeout_s: float, facts: dict[str, Any] | None = None
) -> dist.TCPStore:
    """The run's store; port 0 lets the master choose (store.port
    tells). Raises UserError when it cannot be opened or reached.
    """
    try:
        listening = listen_at(host, port) if is_master else None
        store = dist.TCPStore(
            host,
            listening.getsockname()[1] if listening else port,
            is_master=is_master,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listening.detach() if listening else None,
        )
    except (OSError, RuntimeError, ValueError) as error:  # c10d's errors derive from RuntimeError
        if is_master:
            fix = f"the port is in use or this is not host {socket.gethostname()}: give another launch.store"
        else:
            fix = f"nothing answered within {timeout_s:.0f} s: start the trainers, or correct launch.store"
        raise UserError(f"run store {host}:{port}: {fix} ({' '.join(str(error).split())[:160]})") from None
    if is_master:
        _tell(store, OPEN, json.dumps(facts or {}))
    return store


def _tell(store: dist.Store, key: str, value: str) -> None:
    store.set(key, signed(key, value))
    store.set(NEWS, uuid.uuid4().hex)
    store.check([key])  # waits for the store, which set() does not


def news(store: dist.Store) -> bytes:
    """Another after all that was told of workers, but not after their beats."""
    return store.compare_set(NEWS, "", "")  # as get(), but does not wait where there is none


def claim(store: dist.Store, what: str) -> int:
    """A number of its own for one of WORKERS, REFUSED or STRANGERS."""
    index, mine = claimed(store, what), uuid.uuid4().hex
    while store.compare_set(f"{what}/{index}/claimed", "", mine) != mine.encode():
        index += 1
    return index


def claimed(store: dist.Store, what: str = WORKERS, known: int = 0) -> int:
    """How many numbers were given out, of which `known` are known."""
    while store.check([f"{what}/{known}/claimed"]):
        known += 1
    return known


def read(store: dist.Store, index: int, what: str) -> str | None:
    """What worker `index` told as `what` (info, failed, leaving, gone)."""
    return _told(store, f"rollout/{index}/{what}")


def beats(store: dist.Store, indices: list[int]) -> list[bytes]:
    """The beats of registered workers; empty where somebody removed one, for which multi_get would wait."""
    keys = [f"rollout/{index}/beat" for index in indices]
    if keys and store.check(keys):
        return store.multi_get(keys)
    return [store.get(key) if store.check([key]) else b"" for key in keys]


def _told(store: dist.Store, key: str) -> str | None:
    """What a process of this run told under `key`; None where nobody has, or a stranger did."""
    return verified(key, store.get(key)) if store.check([key]) else None


def tell_refused(store: dist.Store, line: str) -> None:
    """By a worker that does not fit the run, and ends."""
    _tell(store, f"{REFUSED}/{claim(store, REFUSED)}", line)


class Refusals:
    """Workers that came and were not taken, each told once."""

    def __init__(self, store: dist.Store) -> None:
        self._store, self._strangers, self._refused = store, 0, 0

    def announce_new(self) -> None:
        count = claimed(self._store, STRANGERS, self._strangers)
        if count > self._strangers:
            announce("a rollout worker with another MEGARL_TOKEN is refused: set the same on all hosts")
        self._strangers = count
        while self._refused < claimed(self._store, REFUSED, self._refused):
            line = _told(self._store, f"{REFUSED}/{self._refused}")
            if line is None and not self._store.check([f"{REFUSED}/{self._refused}"]):
                return  # counted, not yet told
            announce(line or "a rollout worker with another MEGARL_TOKEN is refused")
            self._refused += 1

    def in_words(self) -> str:
        """To be added to how many workers came."""
        count = self._strangers + self._refused
        return f", {count} {'was' if count == 1 else 'were'} refused" if count else ""


def claim_index(store: dist.Store) -> int:
    """A number of its own for a worker that is about to start a server; failures can be
    reported under it from here on.
    """
    return claim(store, WORKERS)


def from_known(fields: dict[str, Any]) -> WorkerInfo:
    """The inverse of asdict. A worker that told no tokens has those of the run."""
    tokens = Tokens(**fields["tokens"]) if "tokens" in fields else server_tokens()
    return WorkerInfo(**fields | {"tokens": tokens or Tokens("", "")})


def register_worker(store: dist.Store, info: WorkerInfo) -> None:
    """Announces a server that answers requests. Tokens that follow from the run's secret stay out of the store."""
    entry = asdict(info)
    if run_secret():
        del entry["tokens"]
    heartbeat(store, info.index)
    _tell(store, f"rollout/{info.index}/info", json.dumps(entry))


def heartbeat(store: dist.Store, index: int) -> None:
    store.set(f"rollout/{index}/beat", str(time.monotonic_ns()))


def report_failure(store: dist.Store, index: int, text: str, again: bool = False) -> None:
    """again: the server is started again, so that trainers which only begin may wait for it."""
    if again:
        _tell(store, f"rollout/{index}/again", "1")
    _tell(store, f"rollout/{index}/failed", text)


def worker_leaves(store: dist.Store, index: int) -> None:
    """It finishes what it has, and wants nothing new."""
    _tell(store, f"rollout/{index}/leaving", "1")


def worker_left(store: dist.Store, index: int) -> None:
    _tell(store, f"rollout/{index}/gone", "1")


def shutdown_requested(store: dist.Store) -> bool:
    return _told(store, "rollout/shutdown") is not None


def wait_for_workers(
    store: dist.Store, n: int, timeout_s: float, refusals: Refusals | None = None, resumed: bool = False
) -> list[WorkerInfo]:
    """The `n` workers that came first. Raises RolloutDied if one fails meanwhile, UserError when too few come.

    A run that was under way before, since it is `resumed` or workers come back to it, may have lost some for good: it
    goes on without those that failed, and with one or more BACK_S after the last that came back, or after timeout_s.
    """
    workers: dict[int, WorkerInfo] = {}
    failed, back_until = dict[int, str](), 0.0
    refusals = refusals or Refusals(store)
    announce(f"waiting for {plural(n, 'rollout server')}")
    deadline = time.monotonic() + timeout_s
    while True:
        for index in range(claimed(store)):
            if index in failed:
                continue
            if any(read(store, index, what) is not None for what in ("again", "leaving", "gone")):
                workers.pop(index, None)
                continue
            if resumed and (text := read(store, index, "failed")) is not None:
                failed[index] = text.partition("; last lines of ")[0]
                announce(f"{failed[index]}; going on without it")
                workers.pop(index, None)
                continue
            _raise_if_failed(store, index)
            if index not in workers and (info := read(store, index, "info")) is not None:
                worker = from_known(json.loads(info))
                for other in [i for i in workers if workers[i].url == worker.url]:  # it had lost the store
                    del workers[other]
                workers[index] = worker
                resumed = resumed or worker.back
                back_until = time.monotonic() + BACK_S if worker.back or back_until else 0.0
                announce(f"rollout server {worker.url} answers, {len(workers)} of {n}")
        refusals.announce_new()
        if len(workers) >= n:
            return [workers[index] for index in sorted(workers)][:n]
        late = time.monotonic() > deadline
        if workers and resumed and (late or (back_until and time.monotonic() > back_until)):
            announce(f"{len(workers)} of {plural(n, 'rollout worker')} came: going on with these; others may join")
            return [workers[index] for index in sorted(workers)]
        if late:
            came = f"{len(workers)} of {n} rollout workers came within {timeout_s:.0f} s{refusals.in_words()}"
            if failed:
                raise UserError(f"{came}. The last that failed: {list(failed.values())[-1]}")
            raise UserError(
                f"{came}: start `megarl rollout` with the same launch.store, or raise rollout.start_timeout_s"
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
    """Raises RolloutDied, with the worker's own account, if one reported a failure. Who is silent: members.py.

    wait_s: after a broken connection, how long to wait for that account.
    """
    deadline = time.monotonic() + wait_s
    while True:
        for worker in workers:
            _raise_if_failed(store, worker.index)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.1)


def _raise_if_failed(store: dist.Store, index: int) -> None:
    if (text := _told(store, f"rollout/{index}/failed")) is not None:
        raise RolloutDied(text)


def request_shutdown(store: dist.Store, workers: list[WorkerInfo], wait_s: float = 8.0) -> None:
    """Asks every worker to end and waits, at most `wait_s`, until they
    have: the store must outlive them for a clean exit.
    """
    _tell(store, "rollout/shutdown", "1")
    keys = [f"rollout/{worker.index}/gone" for worker in workers]
    deadline = time.monotonic() + wait_s
    while any(_told(store, key) is None for key in keys) and time.monotonic() < deadline:
        time.sleep(0.05)
