"""A temporary directory for the processes of one command, removed with all that they leave there: vLLM's sockets, torch
elastic's folders. That of a command that was killed is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "megarl_"
LOCK = ".lock"  # held by the owner; the kernel lets go of it when that process ends
SOCKET_BYTES = 107  # most that the path of a unix socket may have
NAME_BYTES = 2 * len(f"/{PREFIX}xxxxxxxx") + len(
    "/00000000-0000-0000-0000-000000000000"
)  # one inside another, vLLM's name


@contextlib.contextmanager
def scratch() -> Iterator[dict[str, str]]:
    """The environment by which the processes of a command use the directory; it lasts as long as the block."""
    outer = tempfile.gettempdir()
    if len(os.fsencode(outer)) + NAME_BYTES > SOCKET_BYTES:
        outer = "/tmp"
    _sweep(Path(outer))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=outer))
    try:
        with (folder / f"{LOCK}.new").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / f"{LOCK}.new").rename(folder / LOCK)  # whoever sees it sees it held
            cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(outer, f"torchinductor_{_user()}")
            where = {"TMPDIR": str(folder), "VLLM_RPC_BASE_PATH": str(folder)}
            yield {**where, "TORCHINDUCTOR_CACHE_DIR": cache}  # compiled kernels are to last
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(outer: Path) -> None:
    """Removes directories of ours whose owner has ended."""
    for folder in outer.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (folder / LOCK).open("r+", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
