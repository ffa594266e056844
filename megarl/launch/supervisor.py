"""Starts processes, watches them, and ends all of them together: when the main one ends, when any fails, on a signal.

Every child leads a process group of its own, so a terminal's Ctrl-C reaches only this
process, which then decides. A child dies with this process even if it is killed
(lifeline.die_with_parent), and this process adopts and ends what its children leave behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megarl.announce import ANSWERED
from megarl.launch.backoff import Backoff
from megarl.launch.lifeline import adopt_orphans, descendants, die_with_parent, is_stopped

_POLL_S = 0.05
_LOG_TAIL = 25
_FULL_BYTES = 2**16
STOPPED_S = 15.0  # a process that is stopped for so long is taken for dead


@dataclass
class Process:
    """One process to start. `env` is added to ours. stderr goes to `log`; so does stdout, or, with stdout_to_terminal,
    to our own terminal.
    """

    name: str
    argv: list[str]
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    stdout_to_terminal: bool = False


class _Stopped(BaseException):
    def __init__(self, signum: int) -> None:
        self.signum = signum


def supervise(
    main: Process,
    helpers: list[Process],
    *,
    grace_s: float = 5.0,
    stop_s: float = 0.0,
    max_restarts: int = 0,
    explain: Callable[[], str | None] = lambda: None,
    again: Callable[[int], float | None] = lambda code: None,
) -> int:
    """Runs `main` and its `helpers` until `main` ends; returns the exit status of the whole.

    0 if main ended with 0. If main fails for good or a helper ends with a status other than 0, one line names it, its
    log's last lines follow, and the status is its own (1 for a signal). `explain()` may give a better text for a
    failure of main; `again(code)` may say that main is started again, and give the seconds until then. SIGINT gives
    130, SIGTERM 143; with `stop_s`, main first gets SIGUSR1 and so many seconds to end by itself, or until a second
    signal. In every case all processes are ended before this returns: SIGTERM, after `grace_s` seconds SIGKILL. A
    helper may end with 0 early.

    A helper that once answered (its log says so) does not end the others. Where it was killed, which it cannot mend
    itself, or hangs, it is started again, as launch.max_restarts says.
    """
    adopt_orphans()
    running: dict[str, subprocess.Popen[bytes]] = {}

    def stop(signum: int, frame: object) -> None:
        raise _Stopped(signum)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    status = 1
    try:
        for process in [*helpers, main]:
            running[process.name] = _start(process)
        status = _watch(main, [_Helper(helper, max_restarts) for helper in helpers], running, explain, again)
    except _Stopped as stopped:
        with contextlib.suppress(_Stopped, ProcessLookupError, subprocess.TimeoutExpired):  # a second one ends this
            status = 128 + stopped.signum
            child = running.get(main.name) if stop_s else None
            how = f"; what is not saved is saved first, at most {stop_s:g} s (again: at once)" if child else ""
            name = signal.Signals(stopped.signum).name
            print(f"\nmegarl: {name}, ending all processes{how}", file=sys.stderr, flush=True)
            if child:
                child.send_signal(signal.SIGUSR1)
                child.wait(stop_s)
    finally:
        for signum in before:
            signal.signal(signum, lambda *_: _kill_everything())
        if status == 0:
            _wait(running, grace_s)  # the helpers were told through the store
        _end(running, grace_s)
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return status


def _start(process: Process) -> subprocess.Popen[bytes]:
    process.log.parent.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()
    with process.log.open("ab") as log:
        stdout: IO[bytes] | None = None if process.stdout_to_terminal else log
        return subprocess.Popen(
            process.argv,
            env={**os.environ, **process.env},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=log,
            process_group=0,
            preexec_fn=lambda: die_with_parent(parent, signal.SIGTERM),
        )


def _watch(
    main: Process,
    helpers: list[_Helper],
    running: dict[str, subprocess.Popen[bytes]],
    explain: Callable[[], str | None],
    again: Callable[[int], float | None],
) -> int:
    start_at: float | None = None  # of main, which has failed
    standing = _Standing()
    while True:
        for helper in helpers:
            if failed := helper.look(running):
                print(failure_text(helper.process, failed), file=sys.stderr, flush=True)
                return _exit_status(failed)
        code = running[main.name].poll()
        if start_at is not None:
            if time.monotonic() >= start_at:
                running[main.name], start_at = _start(main), None
        elif code is not None:
            text = code and (explain() or failure_text(main, code))
            wait_s = again(code) if code else None
            if wait_s is None:
                if code:
                    print(text, file=sys.stderr, flush=True)
                return _exit_status(code)
            _kill_everything(spared=[child.pid for name, child in running.items() if name != main.name])
            start_at = time.monotonic() + wait_s
        else:
            standing.end(running[main.name])
        time.sleep(_POLL_S)


class _Standing:
    """Ends a process that somebody stopped (SIGSTOP): nothing else would."""

    _since: float | None = None

    def end(self, child: subprocess.Popen[bytes]) -> None:
        """Kills it, where it has been stopped for STOPPED_S."""
        now = time.monotonic()
        if not is_stopped(child.pid):
            self._since = None
        elif self._since is None:
            self._since = now
        elif now - self._since > STOPPED_S:
            child.kill()


class _Helper:
    """One helper while main runs."""

    def __init__(self, process: Process, max_restarts: int) -> None:
        self.process = process
        self._backoff = Backoff(max_restarts)
        self._start_at: float | None = None  # of the next start, while it waits for it
        self._over = False
        self._standing = _Standing()

    def look(self, running: dict[str, subprocess.Popen[bytes]]) -> int:
        """The status of a failure that ends everything, else 0."""
        if self._over:
            return 0
        if self._start_at is not None:
            if time.monotonic() >= self._start_at:
                self._start_at = None
                running[self.process.name] = _start(self.process)
                self._backoff.began()
            return 0
        child = running[self.process.name]
        code = child.poll()
        if code is None:
            self._standing.end(child)
        elif code and not _answered(self.process.log):
            return code
        elif code is not None:
            wait_s = self._backoff.next() if code < 0 else None  # one that gave up has told why, and has tried itself
            self._over = wait_s is None
            if wait_s is not None:
                self._start_at = time.monotonic() + wait_s
            if code:
                then = "no more is started" if self._over else f"it is started again in {wait_s:g} s"
                said = f"megarl: {self.process.name} {describe_exit(code)}; its log is {self.process.log}; {then}"
                print(said, file=sys.stderr, flush=True)
        return 0


def _answered(log: Path) -> bool:
    """Whether a rollout worker has ever served: a server that never did is no fault that another start mends."""
    try:
        with log.open(errors="replace", encoding="utf-8") as file:
            return any(line.startswith(ANSWERED) for line in file)
    except OSError:
        return False


def failure_text(process: Process, code: int) -> str:
    """What the process itself said as `megarl: error: ...`; else one
    line that says how it ended, then its log's last lines.
    """
    tail = log_tail(process.log)
    if (start := tail.rfind("megarl: error: ")) >= 0:
        return tail[start:]
    return ended_text(f"{process.name} {describe_exit(code)}", process.log)


def ended_text(what: str, log: Path) -> str:
    """One line that says what happened, then the last lines of the log. A full disk, which takes no log, is named."""
    tail = log_tail(log)
    if shutil.disk_usage(log.parent).free < _FULL_BYTES:
        what += f", and the disk of {str(log.parent)!r} is full: make room there"
    text = f"megarl: error: {what}; all processes are being ended"
    return f"{text}; last lines of {log}:\n{tail}" if tail else f"{text}; its log {log} is empty"


def describe_exit(code: int) -> str:
    """A Popen return code in words."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with status {code}"


def log_tail(path: Path, lines: int = _LOG_TAIL) -> str:
    """The last lines of a log; empty where there is none."""
    try:
        with path.open(errors="replace", encoding="utf-8") as file:
            return "\n".join(line.rstrip() for line in deque(file, lines) if line.strip())
    except OSError:
        return ""


def _exit_status(code: int) -> int:
    return code if code >= 0 else 1


def _wait(running: dict[str, subprocess.Popen[bytes]], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while any(child.poll() is None for child in running.values()):
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_S)
    return True


def _end(running: dict[str, subprocess.Popen[bytes]], grace_s: float) -> None:
    for child in running.values():
        _signal_group(child, signal.SIGTERM)
    _wait(running, grace_s)
    _kill_everything()
    for child in running.values():
        child.wait()
    _reap()


def _signal_group(child: subprocess.Popen[bytes], signum: int) -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signum)


def _kill_everything(spared: list[int] = []) -> None:
    """SIGKILL to all that is below us, but `spared` and what is below them, until nothing is: a process may fork while
    we look.
    """
    until, ended = time.monotonic() + 5, set[int]()
    while (pids := _below(spared)) and time.monotonic() < until:
        ended |= pids
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    for pid in ended:
        with contextlib.suppress(ChildProcessError):  # not adopted: its own parent saw it end
            os.waitpid(pid, os.WNOHANG)


def _below(spared: list[int]) -> set[int]:
    return set(descendants(os.getpid())).difference(spared, *map(descendants, spared))


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
