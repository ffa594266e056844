"""The torch_dist checkpoint format, read and written one tensor at a time without a process group.

A folder holds `*.distcp` files, each a row of torch.save archives, and `.metadata`, a pickle that says where each chunk
of each global tensor lies (torch/distributed/checkpoint/filesystem.py); megatron-core adds metadata.json and common.pt.
Global tensors know nothing of the layout they were written in. The private names of torch that this needs are used here
alone; held by tests/unit/test_convert.py. torch's own reader without a process group takes twice the time (0.6 GB in
108 tensors, page cache: 1.4 s against 0.7), reads whole chunks for every rectangle, and runs what the pickle names.
"""

from __future__ import annotations

import bisect
import importlib
import io
import json
import os
import pickle
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.weights.files.disk_file import DiskFile
from megarl.weights.files.raw_file import RawFile, Spec, put_together
from megarl.weights.rect import Rect, Shape

METADATA = ".metadata"
CHECKPOINT = "torch.distributed.checkpoint"  # imported where it is written: that takes longer than torch itself
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
            return _stored_tensors(_Metadata((self.path / METADATA).read_bytes()).load())
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

    def read(self, key: str, rect: Rect) -> Tensor:
        """A rectangle of a global tensor, put together from the chunks that it meets."""
        stored = self._stored[key]
        shared = ((chunk, rect.intersect(chunk.rect)) for chunk in stored.near(rect))
        parts = ((part, self._read_chunk(chunk, stored.spec.dtype, part)) for chunk, part in shared if part)
        tensor = put_together(rect, parts)
        if tensor is None:
            raise UserError(f"checkpoint {str(self.path)!r} holds only a part of {key!r}; it is damaged")
        return tensor

    def _read_chunk(self, chunk: Chunk, dtype: torch.dtype, rect: Rect) -> Tensor:
        """rect: within the global tensor."""
        try:
            file = self._open(chunk.file)
            if chunk not in self._begins:
                self._begins[chunk] = _data_offset(file, chunk)
            return file.read(self._begins[chunk], Spec(dtype, chunk.rect.size), rect.within(chunk.rect))
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
        if isinstance(entry, _TensorStorageMetadata)
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


class _Metadata(pickle.Unpickler):
    """The pickle of `.metadata`. Nothing that it names is called: its objects are _Standin with the same attributes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        known = {kind.__name__.strip("_"): kind for kind in (_TensorStorageMetadata, _TensorProperties)}
        return known.get(name, _Standin) if module == f"{CHECKPOINT}.metadata" else _Standin


class _Ours(_Metadata):
    """The names that a checkpoint needs alone. What BUILD would change of a class is a TypeError of its stand-in."""

    ALLOWED: ClassVar = {
        f"{CHECKPOINT}.metadata": "Metadata TensorStorageMetadata BytesStorageMetadata TensorProperties"
        " ChunkStorageMetadata MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
        f"{CHECKPOINT}.planner": "SavePlan WriteItem WriteItemType TensorWriteData",
        f"{CHECKPOINT}.filesystem": "_StorageInfo",
        "torch.serialization": "_get_layout",
    }

    def find_class(self, module: str, name: str) -> Any:
        plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if plain or name in self.ALLOWED.get(module, "").split():
            return super().find_class(module, name)
        raise UserError(f"it names {module}.{name}")


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
            _Ours(content).load()
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


class _Standin:
    """Of any object of the pickle: a chunk's place, parts of a save plan, the metadata itself, whose class is
    megatron-core's own in its older releases. Takes whatever it is given.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _TensorStorageMetadata(_Standin):
    properties: Any
    size: Any


class _TensorProperties(_Standin):
    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


class _Window:
    """A torch.save archive inside a file, as torch's archive reader wants it."""

    def __init__(self, file: RawFile, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

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


def _data_offset(file: RawFile, chunk: Chunk) -> int:
    """Where in the file the chunk's elements begin: torch.save stores
    them as they are, uncompressed, as the record data/0.
    """
    if file.size < chunk.offset + chunk.length:
        raise UserError(
            f"{str(file.path)!r} is truncated: {file.size} bytes, {chunk.offset + chunk.length} are needed; it is "
            "damaged"
        )
    try:
        archive: Any = torch._C.PyTorchFileReader(cast(IO[bytes], _Window(file, chunk.offset, chunk.length)))
        strides = _Tensors(archive.get_record("data.pkl")).strides
        begin = archive.get_record_offset("data/0")
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{str(file.path)!r}: {chunk.key!r} cannot be read ({' '.join(str(error).split())[:100]}); it is damaged"
        ) from None
    if strides != torch.empty(chunk.rect.size, device="meta").stride():
        raise UserError(f"{str(file.path)!r}: {chunk.key!r} is not stored row after row; write the checkpoint again")
    return chunk.offset + begin


class _Tensors(pickle.Unpickler):
    """The pickle of a single saved tensor: its strides. Calls nothing that the pickle names."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        loaded = self.load()
        if not isinstance(loaded, tuple) or loaded[0]:
            raise ValueError("no tensor that begins its storage")
        self.strides = tuple(loaded[1])

    def persistent_load(self, pid: Any) -> Any:
        return None

    def find_class(self, module: str, name: str) -> Any:
        if name == "_rebuild_tensor_v2":
            return lambda storage, offset, size, stride, *rest: (offset, stride)
        if name == "_rebuild_parameter":
            return lambda data, *rest: data
        return type(name, (), {}) if name.endswith("Storage") else OrderedDict if name == "OrderedDict" else None


class TorchDistWriter:
    """One file of chunks."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path, self._name = folder / f".{name}", name
        self._stream = DiskFile(self._path)
        # while the first file is written; write_metadata waits for it
        threading.Thread(target=importlib.import_module, args=(f"{CHECKPOINT}.filesystem",), daemon=True).start()
        self.chunks: list[Chunk] = []

    def write(self, key: str, offset: Shape, tensor: Tensor) -> None:
        """The rectangle of `key` that begins at `offset`. tensor: contiguous, and all of its storage."""
        begin = self._stream.tell()
        torch.save(tensor, cast(IO[bytes], self._stream))
        rect = Rect(offset, tuple(tensor.shape))
        self.chunks.append(Chunk(key, rect, self._name, begin, self._stream.tell() - begin))

    def close(self) -> None:
        """Flushes to disk, then gives the file its name."""
        self._stream.close()
        os.replace(self._path, self._path.with_name(self._name))

    def abort(self) -> None:
        """Closes without a flush that would fail again on a full disk."""
        self._stream.abort()


def write_metadata(folder: Path, specs: dict[str, Spec], chunks: list[Chunk]) -> None:
    """What makes the files a checkpoint. Last of all `.metadata`."""
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint import metadata as meta

    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(BACKEND), encoding="utf-8")
    tensors: dict[str, Any] = {
        key: meta.TensorStorageMetadata(meta.TensorProperties(spec.dtype), torch.Size(spec.shape), [])
        for key, spec in specs.items()
    }
    storage = {}
    for chunk in chunks:
        offset, size = chunk.rect.offset, chunk.rect.size
        tensors[chunk.key].chunks.append(meta.ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
        storage[meta.MetadataIndex(chunk.key, offset)] = filesystem._StorageInfo(chunk.file, chunk.offset, chunk.length)
    metadata = meta.Metadata(tensors, planner_data={}, storage_data=storage, storage_meta=meta.StorageMeta())
    with open(folder / METADATA, "wb") as stream:
        pickle.dump(metadata, stream)
        stream.flush()
        os.fsync(stream.fileno())
