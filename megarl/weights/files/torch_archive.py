"""What torch.save writes of one tensor: a zip file without compression, by zipfile and without torch.

The records that torch.load asks for (caffe2/serialize/inline_container.cc): data.pkl, byteorder, data/0, version; the
elements begin at a multiple of 64 bytes, as torch's do.
"""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, cast

from megarl.errors import UserError
from megarl.weights.files.disk_file import DiskFile
from megarl.weights.files.raw_file import RawFile, Spec, row_strides
from megarl.weights.files.torch_pickles import TensorPickle, tensor_pickle
from megarl.weights.rect import Shape

FOLDER = "archive"  # any name does: of all records it is the same
PICKLE, ELEMENTS = "data.pkl", "data/0"
ALIGNED = 64  # bytes
PADDING = b"FB"  # the field of a record's header that pads it
FIXED = 30  # bytes of a record's header before its name
ZIP64 = 20  # of the field that a large record's header has besides


class _Window:
    """An archive inside a file, as zipfile reads one."""

    def __init__(self, file: RawFile, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self._position = position + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, count: int = -1) -> bytes:
        left = self._length - self._position
        count = left if count < 0 else min(count, left)
        data = self._file.read_bytes(self._offset + self._position, count)
        self._position += count
        return data


def elements_of(file: RawFile, offset: int, length: int, shape: Shape) -> int:
    """Where in the file the elements of a tensor of that shape begin, whose archive lies at `offset`. Raises ValueError
    where there is none.
    """
    try:
        with zipfile.ZipFile(cast(IO[bytes], _Window(file, offset, length))) as archive:
            records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
        pickled, elements = records[PICKLE], records[ELEMENTS]
        if pickled.compress_type or elements.compress_type:
            raise ValueError("its records are compressed")
        data = file.read_bytes(offset + _begin(file, offset, pickled), pickled.file_size)
        strides = TensorPickle(data).strides
    except UserError:  # the file ends too early
        raise
    except Exception as error:  # whatever a changed byte makes of it
        raise ValueError(f"no archive of a tensor: {error}") from None
    if strides != row_strides(shape):
        raise ValueError("it is not stored row after row")
    return offset + _begin(file, offset, elements)


def _begin(file: RawFile, offset: int, record: zipfile.ZipInfo) -> int:
    """Of its content in the archive: the header before it may be padded, which the directory does not say."""
    header = file.read_bytes(offset + record.header_offset, FIXED)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return record.header_offset + FIXED + name + extra


class _Stream:
    """The file from where it is, which zipfile cannot seek in: sizes then follow what they are of."""

    def __init__(self, file: DiskFile) -> None:
        self._file, self._begin = file, file.tell()
        self.write, self.flush = file.write, file.flush

    def tell(self) -> int:
        return self._file.tell() - self._begin


def write_tensor(file: DiskFile, spec: Spec, pieces: Iterable[memoryview]) -> None:
    """At file.tell(). pieces: the bytes of its elements, row after row."""
    with zipfile.ZipFile(cast(IO[bytes], _Stream(file)), "w") as archive:
        _add_small(archive, tensor_pickle(spec))
        record = zipfile.ZipInfo(f"{FOLDER}/{ELEMENTS}")
        large = spec.nbytes >= zipfile.ZIP64_LIMIT
        begin = archive.start_dir + FIXED + len(record.filename) + len(PADDING) + 2 + (ZIP64 if large else 0)
        fill = -begin % ALIGNED
        record.extra = PADDING + fill.to_bytes(2, "little") + bytes(fill)
        with archive.open(record, "w", force_zip64=large) as stream:
            for piece in pieces:
                stream.write(piece)


def write_empty(path: Path) -> None:
    """What torch.save writes of {}."""
    with zipfile.ZipFile(path, "w") as archive:
        _add_small(archive, pickle.dumps({}, 2))


def _add_small(archive: zipfile.ZipFile, pickled: bytes) -> None:
    for name, content in ((PICKLE, pickled), ("byteorder", sys.byteorder.encode()), ("version", b"3\n")):
        archive.writestr(zipfile.ZipInfo(f"{FOLDER}/{name}"), content)
