"""The torch_dist checkpoint format, read and written one tensor at a time without a process group.

A folder holds `*.distcp` files, each a row of torch.save archives, and `.metadata`, a pickle that says where each chunk
of each global tensor lies (torch/distributed/checkpoint/filesystem.py); megatron-core adds metadata.json and common.pt.
Global tensors know nothing of the layout they were written in. What torch pickles is in torch_pickles.py, its archives
are in torch_archive.py. torch's own reader without a process group takes twice the time (0.6 GB in
108 tensors, page cache: 1.4 s against 0.7), reads whole chunks for every rectangle, and runs what the pickle names.
"""

from __future__ import annotations

import bisect
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megarl.errors import UserError
from megarl.weights.files.disk_file import DiskFile
from megarl.weights.files.raw_file import Bits, Part, RawFile, Spec, read_parts
from megarl.weights.files.torch_archive import elements_of, write_empty, write_tensor
from megarl.weights.files.torch_pickles import (
    MetadataPickle,
    OwnMetadataPickle,
    TensorStorageMetadata,
    metadata_pickle,
)
from megarl.weights.rect import Rect, Shape

METADATA = ".metadata"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
OPEN_FILES = 64
FORCED = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")  # torch/serialization.py, load


@dataclass(frozen=True)
class Chunk:
    """The rectangle `rect` of the global tensor `key`, in `length` bytes at `offset` of `file`."""

    key: str
    rect: Rect
    file: str
    offset: int
    length: int


@dataclass
class _Stored:
    spec: Spec
    chunks: list[Chunk] = field(default_factory=list)  # in the order of `starts`
    starts: list[int] = field(default_factory=list)  # on the first axis
    longest: int = 0  # chunk along the first axis

    def near(self, rect: Rect) -> list[Chunk]:
        """All chunks that may share an element with it: those that do on the first axis."""
        if not rect.size:
            return self.chunks
        first = bisect.bisect_right(self.starts, rect.offset[0] - self.longest)
        return self.chunks[first : bisect.bisect_left(self.starts, rect.end[0])]


class TorchDistReader:
    """`tensors` maps the keys of global tensors to Spec. UserError names what is missing,
    truncated or no longer there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: OrderedDict[str, RawFile] = OrderedDict()
        self._begins: dict[Chunk, int] = {}  # at which byte of its file a chunk's elements begin
        self._stored = self._read_metadata()
        self.tensors = {key: stored.spec for key, stored in self._stored.items()}

    def _read_metadata(self) -> dict[str, _Stored]:
        try:
            return _stored_tensors(MetadataPickle((self.path / METADATA).read_bytes()).load())
        except FileNotFoundError:
            raise UserError(
                f"{str(self.path)!r} has no {METADATA}; give a whole checkpoint, e.g. run.dir/checkpoints/step_N"
            ) from None
        except Exception as error:
            raise UserError(
                f"{str(self.path / METADATA)!r} cannot be read ({error}); the checkpoint is damaged"
            ) from None

    def cut_short(self) -> str | None:
        """The first file that is missing or ends before its last chunk does, in words."""
        ends: dict[str, int] = {}
        for chunk in (chunk for stored in self._stored.values() for chunk in stored.chunks):
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.offset + chunk.length)
        for name, end in sorted(ends.items()):
            path = self.path / name
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < end:
                return f"{name} is missing" if size is None else f"{name} has {size} bytes of {end}"
        return None

    def read(self, key: str, rect: Rect) -> Bits:
        """A rectangle of a global tensor, put together from the chunks that it meets."""
        with self.deletion_named():
            bits = read_parts(rect, self.parts(key, rect))
        if bits is None:
            raise UserError(f"checkpoint {str(self.path)!r} holds only a part of {key!r}; it is damaged")
        return bits

    def parts(self, key: str, rect: Rect) -> Iterator[Part]:
        """What read() reads, of each chunk."""
        stored = self._stored[key]
        for chunk in stored.near(rect):
            if shared := rect.intersect(chunk.rect):
                yield self._part(chunk, stored.spec.dtype, shared)

    def _part(self, chunk: Chunk, dtype: str, rect: Rect) -> Part:
        open_ = partial(self._open, chunk.file)
        if chunk not in self._begins:
            self._begins[chunk] = _elements(open_(), chunk)
        return Part(rect, open_, self._begins[chunk], Spec(dtype, chunk.rect.size), rect.within(chunk.rect))

    @contextmanager
    def deletion_named(self) -> Iterator[None]:
        """In which parts are read: what fails by a checkpoint that is gone says so."""
        try:
            yield
        except UserError:
            if not (self.path / METADATA).is_file():
                raise UserError(
                    f"checkpoint {str(self.path)!r} was deleted while it was read (run.keep); take a newer one, or "
                    "raise run.keep"
                ) from None
            raise

    def _open(self, name: str) -> RawFile:
        if name not in self._files:
            if len(self._files) == OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[name] = RawFile(self.path / name)
        self._files.move_to_end(name)
        return self._files[name]

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()


def _stored_tensors(metadata: Any) -> dict[str, _Stored]:
    tensors = {
        key: _Stored(Spec(entry.properties.dtype, tuple(entry.size)))
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    sizes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key in tensors
        for chunk in metadata.state_dict_metadata[key].chunks
    }
    for index, info in metadata.storage_data.items():
        if index.fqn in tensors:
            offset = tuple(index.offset or ())
            rect = Rect(offset, sizes[index.fqn, offset])
            tensors[index.fqn].chunks.append(Chunk(index.fqn, rect, info.relative_path, info.offset, info.length))
    for stored in tensors.values():
        stored.chunks.sort(key=lambda chunk: chunk.rect.offset)
        stored.starts = [chunk.rect.offset[0] if chunk.rect.size else 0 for chunk in stored.chunks]
        stored.longest = max((chunk.rect.size[0] for chunk in stored.chunks if chunk.rect.size), default=1)
    return tensors


@contextmanager
def foreign_names_refused(path: Path) -> Iterator[None]:
    """In which torch may read the checkpoint at `path`. It makes whatever `.metadata` names, and whatever the bytes of
    an entry without a tensor do (megatron-core 0.19 keeps its common state in one): here the first is looked through
    before, and the second is read as tensors and numbers alone. UserError says what no checkpoint of ours has.
    """
    try:
        content = (path / METADATA).read_bytes()
    except FileNotFoundError:
        content = None  # torch says so
    try:
        if content is not None:
            OwnMetadataPickle(content).load()
    except Exception as error:
        why = str(error) or type(error).__name__
        raise UserError(
            f"checkpoint {str(path)!r} cannot be loaded ({METADATA} cannot be read: {why}); it is damaged, or was not "
            "written by megarl"
        ) from None
    before = {name: os.environ.pop(name, None) for name in FORCED}
    os.environ[FORCED[0]] = "1"
    try:
        yield
    finally:
        del os.environ[FORCED[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _elements(file: RawFile, chunk: Chunk) -> int:
    """Where in the file they begin."""
    if file.size < chunk.offset + chunk.length:
        raise UserError(
            f"{str(file.path)!r} is truncated: {file.size} bytes, {chunk.offset + chunk.length} are needed; it is "
            "damaged"
        )
    try:
        return elements_of(file, chunk.offset, chunk.length, chunk.rect.size)
    except ValueError as error:
        raise UserError(
            f"{str(file.path)!r}: {chunk.key!r} cannot be read ({' '.join(str(error).split())[:100]}); the checkpoint "
            "is damaged: write it again"
        ) from None


class TorchDistWriter:
    """One file of chunks."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path, self._name = folder / f".{name}", name
        self._file = DiskFile(self._path)
        self.chunks: list[Chunk] = []

    def write(self, key: str, offset: Shape, spec: Spec, pieces: Iterable[memoryview]) -> None:
        """The rectangle of `key` that begins at `offset`, which is what `spec` says. pieces: its bytes, in order."""
        begin = self._file.tell()
        write_tensor(self._file, spec, pieces)
        self.chunks.append(Chunk(key, Rect(offset, spec.shape), self._name, begin, self._file.tell() - begin))

    def close(self) -> None:
        """Flushes to disk, then gives the file its name."""
        self._file.close()
        os.replace(self._path, self._path.with_name(self._name))

    def abort(self) -> None:
        """Closes without a flush that would fail again on a full disk."""
        self._file.abort()


def write_metadata(folder: Path, specs: dict[str, Spec], chunks: list[Chunk]) -> None:
    """What makes the files a checkpoint. Last of all `.metadata`."""
    write_empty(folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(BACKEND), encoding="utf-8")
    content = metadata_pickle(specs, [(c.key, c.rect, c.file, c.offset, c.length) for c in chunks])
    with open(folder / METADATA, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
