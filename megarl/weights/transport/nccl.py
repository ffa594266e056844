"""The NCCL half of the group that weights travel by (groups.py). Written after torch's ProcessGroupNCCL; the calls into
it are held by tests/unit/test_nccl_group.py over a stand-in; on a GPU they have run with one rank, before
`gone` and the release of the loaded library were asked for.

What torch would do here, and what it costs a run that loses a rollout worker:
    wait() makes a CUDA stream wait, not the host, so no time limit holds: here the host looks until the work is done
    the watchdog ends the whole process where an operation fails: this group has none of its error handling
    the communicator is made by the first message, by all ranks or none: here at the meeting, before any message
    an abort tells nobody: here the others find the key `gone` in the group's store
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

POLL_S = 0.0005  # between two looks whether a work is done
LOOKS = 1000  # of which one asks the store whether a rank has left
NAMED = 16  # ranks in one line
SETTLE_S = 2.0  # how long close() waits for the thread that is handing operations to NCCL
WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class NcclBackend:
    """Broadcast and grouped messages with a time limit each. Every method may raise RuntimeError."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float, device: torch.device) -> None:
        """All ranks meet, compare their NCCL and make the communicator.

        RuntimeError where they have not come within `timeout_s`, run other releases of NCCL, or have made no
        communicator in as long again.
        """
        meet(store, rank, world_size, timeout_s, nccl_version())
        self._store, self._rank, self._world, self._timeout_s = store, rank, world_size, timeout_s
        self._lock = threading.Lock()  # held while operations are handed to NCCL: an abort would free what they use
        self._closed = False
        self._backend = _make(store, rank, world_size, timeout_s)
        # all ranks or none: one that has died since the meeting would leave the others in it for ever
        try:
            call = _Call(lambda: self._backend.eager_connect_single_device(device))
            Timed(self, call, timeout_s, self._others(rank)).wait()
        except Exception:
            self.abort()  # the others learn of it
            raise

    def broadcast(self, buffer: Tensor, source: int) -> Timed:
        with self._handing_over():
            return Timed(self, self._backend.broadcast(buffer, source), self._timeout_s, self._others(source))

    def exchange(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], tag: int
    ) -> list[Timed]:
        """One group of operations, so that no order among them matters."""
        if not sends and not receives:
            return []
        with self._handing_over():
            self._backend._start_coalescing()
            try:
                for buffer, rank in sends:
                    self._backend.send([buffer], rank, tag)
                for buffer, rank in receives:
                    self._backend.recv([buffer], rank, tag)
            finally:
                work = self._backend._end_coalescing()  # after a failure too: NCCL counts its groups
        return [Timed(self, work, self._timeout_s, [rank for _, rank in (*sends, *receives)])]

    def _others(self, source: int) -> list[int]:
        """Whom this rank waits for in what `source` sends to all."""
        return [other for other in range(self._world) if other != source] if self._rank == source else [source]

    @contextmanager
    def _handing_over(self) -> Iterator[None]:
        with self._lock:
            self.check()
            yield

    def check(self) -> None:
        """RuntimeError once the group was closed."""
        if self._closed:
            raise RuntimeError("the weight group was closed")

    def gone(self) -> str:
        """A rank that has left, if one has and the store says so."""
        with suppress(RuntimeError):
            return self._store.get("gone").decode() if self._store.check(["gone"]) else ""
        return ""

    def abort(self) -> None:
        """What is pending fails, here and at the other end. A thread that is stuck in NCCL is not waited for."""
        if self._closed:
            return
        self._closed = True
        with suppress(RuntimeError):  # the store may be gone too, and with it everybody
            if not self.gone():  # who leaves because another has left is not the one to name
                self._store.set("gone", str(self._rank))
        idle = self._lock.acquire(timeout=SETTLE_S)
        try:
            self._backend.abort()
        finally:
            if idle:
                self._lock.release()


class _Call:
    """A call that cannot be interrupted, as an operation's work: in a thread, which nobody waits for at the end."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call, self._error = call, list[Exception]()
        self._thread = threading.Thread(target=self._run, name="nccl", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:
            self._error.append(error)

    def is_completed(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout: timedelta) -> None:
        for error in self._error:
            raise error


class Timed:
    """An operation's work whose wait() ends: done, closed, or left or late, and then the group is closed."""

    def __init__(self, group: NcclBackend, work: Any, timeout_s: float, others: Iterable[int]) -> None:
        """others: the ranks that it needs besides this one."""
        self._group, self._work, self._timeout_s = group, work, timeout_s
        self._others = named_ranks(others)

    def wait(self) -> None:
        """Until the device is done with it, at most the time limit."""
        deadline, looks = time.monotonic() + self._timeout_s, 0
        while not self._work.is_completed():
            self._group.check()
            looks += 1
            if looks % LOOKS == 0 and (rank := self._group.gone()):
                self._group.abort()
                raise RuntimeError(f"rank {rank} of the weight group left it while this one waited for {self._others}")
            if time.monotonic() > deadline:
                self._group.abort()
                raise RuntimeError(f"weight group: NCCL was not done within {self._timeout_s:g} s with {self._others}")
            time.sleep(POLL_S)
        self._group.check()  # an aborted operation counts as completed
        self._work.wait(timedelta(seconds=self._timeout_s))  # with a limit it raises what failed


def named_ranks(ranks: Iterable[int]) -> str:
    """In words; of many the first."""
    each = sorted(set(ranks))
    more = f" and {len(each) - NAMED} more" if len(each) > NAMED else ""
    return f"rank {', '.join(map(str, each[:NAMED]))}{more}"


def nccl_version() -> str:
    """Of the library that this process has loaded. torch.cuda.nccl.version() is that of the headers which torch was
    built with: two builds of torch over one NCCL differ there, and two libraries under one build do not.
    """
    ask = getattr(dist.ProcessGroupNCCL, "get_runtime_nccl_version", None)
    return ".".join(map(str, ask() if ask is not None else _loaded_release()))


def _loaded_release() -> Sequence[int | str]:
    """Of a torch that does not say."""
    code = ctypes.c_int()
    try:
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(code))
    except OSError:  # NCCL is linked into torch: its headers are the library's
        return torch.cuda.nccl.version()
    return code.value // 10_000, code.value // 100 % 100, code.value % 100


def meet(store: dist.Store, rank: int, world_size: int, timeout_s: float, version: str) -> None:
    """Waits for all ranks and compares their releases of NCCL: two that differ fail inside it, as an internal error.

    store: one of this group alone. RuntimeError, the same on every rank.
    """
    store.set(f"nccl/{rank}", version)
    keys = [f"nccl/{other}" for other in range(world_size)]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError:
        missing = named_ranks(other for other, key in enumerate(keys) if not store.check([key]))
        raise RuntimeError(f"weight group: {missing} did not come within {timeout_s:g} s") from None
    versions = [store.get(key).decode() for key in keys]
    if len(set(versions)) > 1:
        who = "; ".join(
            f"{release} on rank {', '.join(str(other) for other, theirs in enumerate(versions) if theirs == release)}"
            for release in sorted(set(versions))
        )
        raise RuntimeError(
            f"weight group: NCCL {who}: all must run one release; install the same nvidia-nccl package for trainers "
            "and rollout workers (launch.rollout_python)"
        )


def _make(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> Any:
    """ProcessGroupNCCL reads how it handles errors from the environment, when it is made."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=2 * timeout_s)  # ours comes first
    before = os.environ.get(WATCHDOG)
    os.environ[WATCHDOG] = "0"
    try:
        return dist.ProcessGroupNCCL(store, rank, world_size, options)
    finally:
        if before is None:
            del os.environ[WATCHDOG]
        else:
            os.environ[WATCHDOG] = before
