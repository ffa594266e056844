"""One megarl a run directory: a lock that the kernel lets go when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from megarl.announce import announce
from megarl.errors import UserError


class InUse(UserError):
    """Another process has the run directory."""


@contextlib.contextmanager
def owned(log_dir: Path) -> Iterator[None]:
    """Holds run.dir's lock for those who write to `log_dir`, a folder in it. UserError, which names the process that
    holds it, where there is one (InUse); and where run.dir cannot be made.
    """
    run_dir = log_dir.parent
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / f".{log_dir.name}.lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"run.dir {str(run_dir)!r} cannot be made or written ({error.strerror}: {error.filename!r}); give a folder "
            "that can"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            raise InUse(
                f"run.dir {str(run_dir)!r} is in use by process {owner}; stop that one or give another run.dir"
            ) from None
        except OSError as error:  # Lustre, say, mounted without locks
            announce(
                f"megarl: warning: run.dir {str(run_dir)!r} cannot be locked ({error.strerror}): nothing keeps "
                "a second run out of it"
            )
        try:  # past the file's buffer, which would be written again at its end
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            raise UserError(f"run.dir {str(run_dir)!r} cannot be written ({error.strerror}): make room there") from None
        yield
