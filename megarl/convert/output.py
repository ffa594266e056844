"""The folder a conversion writes: whole or not there, and gone on with after an interruption.

Everything is written into `.OUT.partial` beside OUT, file by file; a file has its
name only when it is whole. The folder is renamed at the end. What the conversion
was asked for is kept in it, so that a second call goes on only with the same work.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.errors import UserError
from megarl.folders import MARK, finish, refuse_output, unfinished

PLAN = ".plan.json"


@contextmanager
def output_folder(out: Path, plan: dict[str, Any], nbytes: int) -> Iterator[Path]:
    """Gives the partial folder; renames it to `out` at the end of the block. nbytes: what will be written in all.

    UserError where `out` exists, another conversion writes it, or the
    disk is full: what was written stays for the next call.
    """
    refuse_output("--out", out)
    partial = unfinished(out)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {str(out)!r} cannot be made: {error.strerror}; give another folder") from None
    with open(partial.with_name(partial.name + ".lock"), "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {str(out)!r}: another conversion is writing it; wait for it or give another folder"
            ) from None
        _start(partial, plan)
        _check_space(partial, out, nbytes)
        try:
            yield partial
            (partial / PLAN).unlink()
            _flush(partial)
            finish("--out", out)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"--out {str(out)!r}: the disk is full; free some space and call again, it goes on where it stopped"
            ) from None
        finally:
            Path(lock.name).unlink(missing_ok=True)


def _start(partial: Path, plan: dict[str, Any]) -> None:
    """Keeps what an earlier call with the same plan has finished; begins anew otherwise."""
    plan = json.loads(json.dumps(plan))
    try:
        same = json.loads((partial / PLAN).read_text(encoding="utf-8")) == plan
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(partial)
        partial.mkdir()
        (partial / MARK).touch()
        (partial / PLAN).write_text(json.dumps(plan), encoding="utf-8")


def _check_space(partial: Path, out: Path, nbytes: int) -> None:
    written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(partial).free
    if free < nbytes - written:
        raise UserError(
            f"--out {str(out)!r} needs {gib(nbytes - written)}, the disk has {gib(free)} free; free some space or "
            "give another"
        )


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def _flush(partial: Path) -> None:
    """Large files are on disk already; the small ones and the names must be, before the rename is."""
    for path in [*(p for p in partial.rglob("*") if p.is_file() or p.is_dir()), partial]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def fingerprint(folder: Path, patterns: tuple[str, ...]) -> list[list[Any]]:
    """Name, size and time of the files a conversion reads: another source is another plan."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
