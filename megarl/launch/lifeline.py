"""Parents, children and orphans on Linux: a child that ends with its
parent, a parent that inherits every orphan below it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent_pid: int, death_signal: int = signal.SIGKILL) -> None:
    """Asks the kernel to send `death_signal` to this process when its parent ends, however it ends.

    `parent_pid` is the parent's pid as the parent knows it: where it has already ended, the signal is sent at once. The
    setting survives exec but not fork, so every level of a tree calls this for itself.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), death_signal)


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent ends, so that `descendants` sees them all."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal (SIGSTOP) or a debugger."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False


def descendants(pid: int) -> list[int]:
    """The pids below `pid`, zombies left out, in no order."""
    processes = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we looked
                if child.status() != psutil.STATUS_ZOMBIE:
                    processes.append(child.pid)
    return processes
