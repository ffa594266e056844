"""`megarl rollout CONFIG`: a vLLM server that serves a run, for as long as the run, the server or a signal lets it.

It registers in the run's store, beats there while its server answers, starts the server again when it fails, comes
back under a new number when the store was lost (trainers that are started again open a new one), and leaves no process
behind. SIGTERM drains: nothing new is taken, what runs is finished. SIGINT and a second SIGTERM end it at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from megarl import door
from megarl.addresses import own_address, resolve
from megarl.announce import answers_line
from megarl.config import Config
from megarl.errors import UserError
from megarl.launch.backoff import Backoff
from megarl.launch.ports import reserve_port
from megarl.launch.scratch import scratch
from megarl.launch.stop import TWICE_S
from megarl.rollout import registry
from megarl.rollout.patience import STALE_S
from megarl.rollout.registry import BEAT_S, WorkerInfo
from megarl.rollout.store import facts, refuse_foreign, refuse_other
from megarl.server.probe import Probe, healthy
from megarl.server.serverlog import cause, log_tail
from megarl.server.store_link import StoreLink, StoreLost
from megarl.server.supervise import check_installed, start_server, stop_server
from megarl.server.vllm_release import installed, warn_of

QUIET_S = 3.0  # a server that has not answered for so long has no beats; the trainers wait STALE_S more
HUNG_S = 2 * STALE_S  # and after so long it is taken for dead here too
NOTICED_S = 3 * BEAT_S  # the trainers have read by then that a worker leaves
GONE_S = 5.0  # a store that does not answer for so long is not told that this worker is gone
TELLS_S = 5.0  # after so long without a store a worker says what it waits for


class _Stopped(Exception):
    """A signal that ends everything at once."""


class _Failed(Exception):
    """The server ended, never answered, or hangs: one line, and its log's last ones. wait_s: until it is started again;
    None where it is not.
    """

    def __init__(self, text: str, wait_s: float | None) -> None:
        super().__init__(text)
        self.wait_s = wait_s


def run_rollout(config: Config, store_host: str, store_port: int, log_dir: Path) -> int:
    """Runs until the trainers ask it to stop or it has drained (returns 0), a signal ends it (128 + its number), or the
    server failed for good or the store did not come back (1).

    What went wrong is one line on stderr, and in the store. The server's log is log_dir/rollout_N.log, N being the
    worker's number. Whoever starts this should make it die with its parent (megarl.launch does).
    """
    check_installed()
    with scratch() as environment:
        os.environ |= environment
        return _run(_Worker(config, store_host, store_port, log_dir))


def _run(worker: _Worker) -> int:
    previous = {number: signal.signal(number, worker.take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return worker.run()
    except _Stopped as stopped:
        return 128 + stopped.args[0]
    finally:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)
        worker.end_server()
        worker.say_gone()
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Worker:
    """serves: registered, so that there may be something to finish before an end. leaving: SIGTERM came then."""

    def __init__(self, config: Config, host: str, port: int, log_dir: Path) -> None:
        self.config, self.log_dir = config, log_dir
        self.serves = self.leaving = False
        self._asked_at = self._ends_at = float("-inf")
        self._link = StoreLink(host, port, config.launch.interface)
        self._backoff = Backoff(config.launch.max_restarts)
        self._answered = self._joined = self._lost_store = False  # ever
        self._child: Any = None
        self._log: IO[bytes] | None = None
        self._probe: Probe | None = None
        self._known_as: int | None = None  # to the trainers, until they are told of its end

    def take(self, number: int, _: object) -> None:
        """A signal's handler. SIGTERM may come directly and by who started this; and another one while the end that the
        first has brought is on its way up.
        """
        if time.monotonic() - self._ends_at < TWICE_S:
            return
        if number == signal.SIGTERM and self.serves and not self.leaving:
            self.leaving, self._asked_at = True, time.monotonic()
            return
        if number == signal.SIGTERM and self.leaving and time.monotonic() - self._asked_at < TWICE_S:
            return
        self._ends_at = time.monotonic()
        raise _Stopped(number)

    def run(self) -> int:
        """One server after the other, as long as one that fails may be started again."""
        while True:
            try:
                info = self._start()
                self._attend(info)
                return 0
            except StoreLost as lost:
                print(f"megarl: error: {lost}", file=sys.stderr)
                return 1
            except _Failed as failed:
                self.end_server()
                wait_s = failed.wait_s
                if wait_s is None:
                    print(f"megarl: error: {failed}", file=sys.stderr)
                    return 1
                print(f"megarl: the server is started again in {wait_s:g} s: {failed}", file=sys.stderr, flush=True)
                time.sleep(wait_s)

    def end_server(self) -> None:
        self.serves = False
        if self._probe is not None:
            self._probe.close()
        if self._child is not None:
            stop_server(self._child)
        if self._log is not None:
            self._log.close()
        self._probe = self._child = self._log = None

    def say_gone(self) -> None:
        """However it ended: the trainers need not wait for its silence."""
        if self._known_as is not None:
            with contextlib.suppress(StoreLost):
                self._link.call_within(GONE_S, registry.worker_left, self._known_as)

    def _start(self) -> WorkerInfo:
        self._log = _open_log(self.log_dir)
        here = _address(self.config, self._link.host)
        info = WorkerInfo(
            -1,  # until the store has given it a number
            f"http://{here}:{reserve_port(here)}",
            self.config.rollout.tp,
            0,
            socket.gethostname(),
            self._log.name,
            door.server_tokens() or door.Tokens(door.new_secret(), door.new_secret()),
        )
        self._child = start_server(self.config, info, self._link.host, self._log)
        return replace(info, pid=self._child.pid)

    def _attend(self, info: WorkerInfo) -> None:
        """Until the run is over or this worker has left it. Raises _Failed, StoreLost."""
        info, deadline = self._join(info), time.monotonic() + self.config.rollout.start_timeout_s
        next_beat = 0.0
        while True:
            try:
                if self._look_at_server(info, deadline):
                    self._register(info)
                if self.leaving:
                    self._drain(info)
                    return
                if time.monotonic() >= next_beat:
                    if self._beat_or_over(info.index):
                        return
                    next_beat = time.monotonic() + BEAT_S
            except StoreLost as lost:
                if self.leaving:  # nobody is left to be told
                    return
                wait_s = self.config.rollout.start_timeout_s
                print(f"megarl: {lost}; it may come back for {wait_s:g} s", file=sys.stderr, flush=True)
                self._lost_store, self._known_as = True, None  # the next store numbers anew
                registered, self.serves = self.serves, False
                info = replace(self._join(info), back=info.back or registered)
                if registered:
                    self._register(info)
            time.sleep(0.1)

    def _look_at_server(self, info: WorkerInfo, deadline: float) -> bool:
        """Whether it answers for the first time. Raises _Failed, in the store too."""
        limit_s = self.config.rollout.start_timeout_s
        if self._child.poll() is not None:
            self._fail(info, f"ended with status {self._child.returncode}")
        if self._probe is not None:
            if self._probe.silent_s > HUNG_S:
                self._fail(info, f"has not answered for {self._probe.silent_s:.0f} s")
            return False
        if healthy(info.url):
            return True
        if time.monotonic() > deadline:
            self._fail(info, f"did not answer within rollout.start_timeout_s = {limit_s:.0f} s")
        return False

    def _register(self, info: WorkerInfo) -> None:
        if self._probe is None:
            self._probe = Probe(info)
        self.serves = True  # before anybody can ask it: and where the store goes meanwhile, the next one is told
        self._known_as = info.index
        self._link.call(registry.register_worker, info)
        if not self._answered:
            print(answers_line(info.index, info.url), flush=True)
        self._answered = True
        self._backoff.began()

    def _beat_or_over(self, index: int) -> bool:
        """Beats, while the server answers. Whether the run is over."""
        if self._probe is None or self._probe.silent_s < QUIET_S:
            self._link.call(registry.heartbeat, index)
        if not self._link.call(registry.shutdown_requested):
            return False
        self.end_server()
        return True

    def _drain(self, info: WorkerInfo) -> None:
        limit_s, start = self.config.rollout.request_timeout_s, time.monotonic()
        print(f"megarl: SIGTERM, leaving when what runs is done, at most {limit_s:g} s (again: at once)", flush=True)
        self._link.call(registry.worker_leaves, info.index)
        while (passed := time.monotonic() - start) < limit_s and self._child.poll() is None:
            idle = self._probe is not None and (not self._probe.running or self._probe.silent_s > HUNG_S)
            if passed > NOTICED_S and idle:
                break
            if self._beat_or_over(info.index):
                return
            time.sleep(BEAT_S)
        self.end_server()

    def _join(self, info: WorkerInfo) -> WorkerInfo:
        """Connects to the run's store, which may come up after this worker did, and takes a number in it."""
        begun, told, limit_s = time.monotonic(), self._joined, self.config.rollout.start_timeout_s
        deadline = begun + limit_s
        while (index := self._number(info)) is None:
            if not told and time.monotonic() > begun + TELLS_S:
                where = f"{self._link.host}:{self._link.port}"
                print(f"megarl: waiting for the run's store {where}, up to {limit_s:g} s", file=sys.stderr, flush=True)
                told = True
            if time.monotonic() > deadline:
                host, port = self._link.host, self._link.port
                if self._joined:
                    raise StoreLost(f"rollout worker {info.index}: the run's store {host}:{port} is gone, stopping")
                raise UserError(
                    f"run store {host}:{port}: nothing answered: start the trainers, or correct launch.store"
                )
            if self._child.poll() is not None and time.monotonic() + 30 < deadline:
                deadline = time.monotonic() + 30  # the server is gone already: wait only to say so
            time.sleep(0.2)
        if info.index < 0 and not self._lost_store:  # a second store numbers anew: such a log may be another's
            path = Path(info.log).with_name(f"rollout_{index}.log")
            os.replace(info.log, path)
            info = replace(info, log=str(path))
        self._joined = True
        if index == 0:  # one worker of a run says it: all have one release
            warn_of(installed())
        return replace(info, index=index)

    def _number(self, info: WorkerInfo) -> int | None:
        """None where the store does not answer, or goes meanwhile: with trainers that are killed, before others open
        a new one.
        """
        try:
            if not self._link.connect():
                return None
            theirs = self._link.call(refuse_foreign, f"{self._link.host}:{self._link.port}")
            if theirs:
                who = f"rollout worker {info.url} on host {info.host}"
                self._link.call(refuse_other, theirs, facts(self.config), installed(), who)
            return int(self._link.call(registry.claim_index))
        except StoreLost:
            return None

    def _fail(self, info: WorkerInfo, what: str) -> None:
        why = cause(Path(info.log))
        line = f"rollout worker {info.index} (pid {info.pid} on {info.host}): the vLLM server {what}"
        line += f": {why}" if why else ""
        text = f"{line}; last lines of {info.log}:\n{log_tail(Path(info.log))}"
        wait_s = self._backoff.next() if self._answered else None
        with contextlib.suppress(StoreLost):  # nobody is left to be told; the server is needed by who comes
            self._known_as = None
            self._link.call(registry.report_failure, info.index, text, wait_s is not None)
        raise _Failed(text, wait_s)


def _open_log(folder: Path) -> IO[bytes]:
    """A log of this worker alone until it has a number: hosts share the folder, and containers their process ids."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, path = tempfile.mkstemp(".log", f"rollout_{socket.gethostname()}_{os.getpid()}_", folder)
    os.fchmod(descriptor, 0o644)
    os.close(descriptor)
    return open(path, "ab")


def _address(config: Config, store_host: str) -> str:
    """The address by which the trainers reach this machine: the one that routes to the store."""
    interface = config.launch.interface
    try:
        return own_address(resolve(store_host, interface, config.rollout.start_timeout_s), interface)
    except OSError as error:
        raise UserError(f"launch.store: {store_host!r} is no host's name here ({error.strerror})") from None
