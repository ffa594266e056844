"""A file that is written once, past the page cache where the file system allows it.

Pages of the cache have to be found, filled and written back, which costs more than the disk does (docs/checkpoints.md);
here bytes go from a few blocks of memory straight to the disk, by a thread, while the caller makes the next ones.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import queue
import threading
from pathlib import Path

import numpy as np

ALIGNMENT = 4096  # bytes: a multiple of every disk's sector; offsets, sizes and addresses of what passes the cache
BLOCK = 8 * 2**20
BLOCKS = 4  # one is filled, one is written, two are between
CACHED = 2**17  # bytes of one write into the cache: Linux takes pages as large as a write, and those are hard to find

_Job = tuple[mmap.mmap, int, int]  # block, its length, where it goes


class DiskFile:
    """Bytes at any places of a new file, quickest one after the other. Raises OSError, of an earlier write as well."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._cached = os.open(path, flags, 0o644)  # for what is not whole pages: no page is written by both
        self._direct = self._cached
        with contextlib.suppress(OSError):  # EINVAL: a file system in memory, some network ones
            self._direct = os.open(path, os.O_WRONLY | getattr(os, "O_DIRECT", 0))
        self._free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        for _ in range(BLOCKS):
            self._free.put(mmap.mmap(-1, BLOCK))
        self._block: mmap.mmap | None = None
        self._begin = self._length = 0  # of the block that is filled: its place in the file, what it holds
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._write_blocks, name="disk", daemon=True)
        self._thread.start()

    def tell(self) -> int:
        """The place behind the last byte that was written."""
        return self._begin + self._length

    def write(self, data: bytes | memoryview) -> int:
        """As a file's: at tell()."""
        self.write_at(self.tell(), data)
        return len(data)

    def flush(self) -> None:
        """Nothing: zipfile asks for it. close() brings everything to the disk."""

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """data: is free again when this returns."""
        if self._error:
            raise self._error
        data = memoryview(data).cast("B")
        if offset != self.tell():
            self._flush_block()
            self._begin = offset
        done = 0
        while done < len(data):
            if self._block is None:
                if at := self.tell() % ALIGNMENT:
                    head = data[done : done + ALIGNMENT - at]
                    _write(self._cached, head, self.tell())
                    self._begin, done = self._begin + len(head), done + len(head)
                    continue
                self._block = self._free.get()
            part = data[done : done + BLOCK - self._length]
            # by numpy, which lets go of the interpreter meanwhile: others read and write
            np.frombuffer(self._block, np.uint8)[self._length : self._length + len(part)] = np.frombuffer(
                part, np.uint8
            )
            self._length, done = self._length + len(part), done + len(part)
            if self._length == BLOCK:
                self._hand_over(BLOCK)

    def close(self) -> None:
        """All of it is on the disk."""
        self._flush_block()
        self._full.put(None)
        self._thread.join()
        try:
            if self._error:
                raise self._error
            os.fsync(self._cached)
        finally:
            self._close()

    def abort(self) -> None:
        """Closes without what is not written yet. Nothing after close()."""
        if self._cached >= 0:
            self._error = self._error or OSError("the file was given up")
            self._full.put(None)
            self._thread.join()
            self._close()

    def _close(self) -> None:
        if self._direct != self._cached:
            os.close(self._direct)
        os.close(self._cached)
        self._direct = self._cached = -1

    def _flush_block(self) -> None:
        """The whole pages of the block to the thread; what is left, less than one, into the cache."""
        if self._block is None:
            return
        whole = self._length - self._length % ALIGNMENT
        rest = self._block[whole : self._length]
        end = self.tell()
        self._hand_over(whole)
        _write(self._cached, memoryview(rest), end - len(rest))
        self._begin = end

    def _hand_over(self, length: int) -> None:
        assert self._block is not None
        self._full.put((self._block, length, self._begin))
        self._block, self._begin, self._length = None, self._begin + length, 0

    def _write_blocks(self) -> None:
        while (job := self._full.get()) is not None:
            block, length, offset = job
            try:
                if not self._error:
                    self._write_block(memoryview(block)[:length], offset)
            except OSError as error:
                self._error = error
            self._free.put(block)

    def _write_block(self, data: memoryview, offset: int) -> None:
        try:
            _write(self._direct, data, offset, CACHED if self._direct == self._cached else BLOCK)
        except OSError as error:
            if error.errno != errno.EINVAL or self._direct == self._cached:
                raise
            _write(self._cached, data, offset)  # a disk of larger sectors


def _write(handle: int, data: memoryview, offset: int, largest: int = CACHED) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done : done + largest], offset + done)
