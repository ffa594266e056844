"""Folders and small files that a command writes whole or not at all: under another name first, renamed at the end.

Nothing is removed that megarl did not make: an unfinished folder carries a mark, and a finished one is never replaced.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from megarl.errors import UserError

MARK = ".megarl"  # in an unfinished folder: what it will be; gone when it is whole


def unfinished(out: Path) -> Path:
    """Where `out` is written until it is whole."""
    out = out.absolute()
    return out.with_name(f".{out.name}.partial")


def standing(path: Path) -> Path:
    """The folder, or whatever it is, that is there and in which `path` would be made."""
    return next(above for above in path.absolute().parents if above.exists() or above.is_symlink())


def takes_files(folder: Path) -> bool:
    """Tried: access() grants root everything, /proc too."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def refuse_output(key: str, out: Path) -> None:
    """Raises UserError where `out` exists, or cannot be begun. key: how the user calls it."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{key} {str(out)!r} already exists; remove it or give another folder")
    there = standing(out)
    if not takes_files(there):
        what = "a file" if there.is_file() else "no folder that can be written to"
        raise UserError(f"{key} {str(out)!r}: {str(there)!r} is {what}; give another folder")
    partial = unfinished(out)
    if partial.exists() and not is_ours(partial):
        raise UserError(f"{key} {str(out)!r} is written under the name {str(partial)!r}, which is there; move it away")


def is_ours(partial: Path) -> bool:
    """Whether an unfinished folder is of megarl's making, or empty."""
    return partial.is_dir() and ((partial / MARK).is_file() or not any(partial.iterdir()))


def begin(key: str, out: Path) -> Path:
    """An empty folder in which `out` is to be made; what an interrupted call left there goes."""
    refuse_output(key, out)
    partial = unfinished(out)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        (partial / MARK).write_text(out.name, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key} {str(out)!r} cannot be made: {error.strerror}; give another folder") from None
    return partial


def finish(key: str, out: Path) -> None:
    """Gives the folder its name. UserError where somebody else took it meanwhile: nothing is lost."""
    partial = unfinished(out)
    if out.exists() or out.is_symlink():
        raise UserError(
            f"{key} {str(out)!r} came into being meanwhile; what was to be written there is whole in {str(partial)!r}"
        )
    (partial / MARK).unlink()
    partial.rename(out)


def write_whole(path: Path, text: str) -> None:
    """A file in UTF-8, in the place of one that is there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
