"""A file written past the page cache holds what was written, wherever that went; what the disk refused is raised."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from megarl.weights.files import disk_file
from megarl.weights.files.disk_file import ALIGNMENT, DiskFile


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_file, "BLOCK", 2 * ALIGNMENT)


@pytest.mark.parametrize("passes_the_cache", [True, False])
@pytest.mark.parametrize("order", ["one after the other", "backwards", "mixed"])
def test_bytes_at_any_places(
    passes_the_cache: bool, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not passes_the_cache:
        monkeypatch.delattr(os, "O_DIRECT")
    draw = random.Random(0)
    sizes = [draw.choice((0, 1, 5, 4096, 4097, 8192, 30_000)) for _ in range(40)]
    want, parts = draw.randbytes(sum(sizes)), list[tuple[int, int]]()
    for size in sizes:
        parts.append((parts[-1][1] if parts else 0, (parts[-1][1] if parts else 0) + size))
    if order == "backwards":
        parts.reverse()
    if order == "mixed":
        draw.shuffle(parts)
    file = DiskFile(tmp_path / "out")
    for begin, end in parts:
        file.write_at(begin, want[begin:end])
    file.close()
    file.abort()  # nothing after close()
    assert (tmp_path / "out").read_bytes() == want


def test_what_the_disk_refused_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block that a thread could not write: at a later write, or at the end."""
    pwrite = os.pwrite

    def full(handle: int, data: Any, offset: int) -> int:
        if offset:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    file = DiskFile(tmp_path / "out")
    with pytest.raises(OSError, match="No space left"):
        file.write(bytes(5 * disk_file.BLOCK))
        file.close()
    file.abort()


def test_a_disk_of_larger_sectors_is_written_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, refused = os.pwrite, list[int]()

    def refuses(handle: int, data: Any, offset: int) -> int:
        if not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", refuses)
    file = DiskFile(tmp_path / "out")
    file.write(b"a" * disk_file.BLOCK)
    file.close()
    assert refused and (tmp_path / "out").read_bytes() == b"a" * disk_file.BLOCK
