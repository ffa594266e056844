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

from megarl.launch.lifeline import adopt_orphans, descendants, die_with_parent

_POLL_S = 0.05
_LOG_TAIL = 25
_FULL_BYTES = 2**16


@dataclass
class Process:
    """One process to start. `env` is added to ours. `stdout` None is our own terminal; stderr always goes to `log`."""

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
    explain: Callable[[], str | None] = lambda: None,
) -> int:
    """Runs `main` and its `helpers` until `main` ends; returns the exit status of the whole.

    0 if main ended with 0. If main fails or a helper ends with a status other than 0, one line names it, its log's last
    lines follow, and the status is its own (1 for a signal). `explain()` may give a better text for a failure of main.
    SIGINT gives 130, SIGTERM 143; with `stop_s`, main first gets SIGUSR1 and so many seconds to end by itself, or until
    a second signal. In every case all processes are ended before this returns: SIGTERM, after `grace_s` seconds
    SIGKILL. A helper may end with 0 early.
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
        status = _watch(main, helpers, running, explain)
    except _Stopped as stopped:
        status = 128 + stopped.signum
        child = running.get(main.name) if stop_s else None
        how = f"; what is not saved is saved first, at most {stop_s:g} s (again: at once)" if child else ""
        print(
            f"\nmegarl: {signal.Signals(stopped.signum).name}, ending all processes{how}", file=sys.stderr, flush=True
        )
        with contextlib.suppress(_Stopped, ProcessLookupError, subprocess.TimeoutExpired):
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
    helpers: list[Process],
    running: dict[str, subprocess.Popen[bytes]],
    explain: Callable[[], str | None],
) -> int:
    while True:
        for helper in helpers:
            code = running[helper.name].poll()
            if code:
                print(failure_text(helper, code), file=sys.stderr, flush=True)
                return _exit_status(code)
        code = running[main.name].poll()
        if code is not None:
            if code != 0:
                print(explain() or failure_text(main, code), file=sys.stderr, flush=True)
            return _exit_status(code)
        time.sleep(_POLL_S)


def failure_text(process: Process, code: int) -> str:
    """What the process itself said as `megarl: error: ...`; else one
    line that says how it ended, then its log's last lines.
    """
    tail = log_tail(process.log)
    if (own := tail.rfind("megarl: error: ")) >= 0:
        return tail[own:]
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


def _kill_everything() -> None:
    """SIGKILL to all that is below us, until nothing is: a process may fork while we look."""
    until = time.monotonic() + 5
    while (pids := descendants(os.getpid())) and time.monotonic() < until:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
