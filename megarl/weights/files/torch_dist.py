"""The torch_dist checkpoint format, read and written one tensor at a time without a process group.

A folder holds `*.distcp` files, each a row of torch.save archives, and `.metadata`, a pickle that says where each chunk
of each global tensor lies (torch/distributed/checkpoint/filesystem.py); megatron-core adds metadata.json and common.pt.
Global tensors know nothing of the layout they were written in. The private names of torch that this needs are used here
alone; held by tests/unit/test_convert.py.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megarl.errors import UserError
from megarl.weights.files.safetensors_file import RawFile, Spec

METADATA = ".metadata"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
OPEN_FILES = 64


@dataclass(frozen=True)
class Chunk:
    """A rectangle of the global tensor `key`, in `length` bytes at `offset` of `file`."""

    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass
class _Stored:
    spec: Spec
    chunks: list[Chunk] = field(default_factory=list)  # by the start on the first axis
    starts: list[int] = field(default_factory=list)
    longest: int = 0  # chunk along the first axis

    def overlapping(self, start: Sequence[int], shape: Sequence[int]) -> list[Chunk]:
        if not shape:
            return self.chunks
        first = bisect.bisect_right(self.starts, start[0] - self.longest)
        last = bisect.bisect_left(self.starts, start[0] + shape[0])
        boxes = ((chunk, zip(chunk.start, chunk.shape, start, shape)) for chunk in self.chunks[first:last])
        return [chunk for chunk, box in boxes if all(a < b + m and b < a + n for a, n, b, m in box)]


class TorchDistReader:
    """`tensors` maps the keys of global tensors to Spec. UserError names what is missing,
    truncated or no longer there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: OrderedDict[str, RawFile] = OrderedDict()
        self._at: dict[Chunk, int] = {}  # where a chunk's bytes begin
        self._stored = self._read_metadata()
        self.tensors = {key: stored.spec for key, stored in self._stored.items()}

    def _read_metadata(self) -> dict[str, _Stored]:
        try:
            metadata = pickle.loads((self.path / METADATA).read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{str(self.path)!r} has no {METADATA}; give a whole checkpoint, e.g. run.dir/checkpoints/step_N"
            ) from None
        except Exception as error:
            raise UserError(
                f"{str(self.path / METADATA)!r} cannot be read ({error}); the checkpoint is damaged"
            ) from None
        found = {
            key: _Stored(Spec(entry.properties.dtype, tuple(entry.size)))
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        shapes = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key in found
            for chunk in metadata.state_dict_metadata[key].chunks
        }
        for index, info in metadata.storage_data.items():
            if index.fqn in found:
                start = tuple(index.offset or ())
                shape = shapes[index.fqn, start]
                found[index.fqn].chunks.append(
                    Chunk(index.fqn, start, shape, info.relative_path, info.offset, info.length)
                )
        for stored in found.values():
            stored.chunks.sort(key=lambda chunk: chunk.start)
            stored.starts = [chunk.start[0] if chunk.start else 0 for chunk in stored.chunks]
            stored.longest = max((chunk.shape[0] for chunk in stored.chunks if chunk.shape), default=1)
        return found

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

    def read(self, key: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The rectangle [start, start + shape) of a global tensor, put together from the chunks that it meets."""
        stored = self._stored[key]
        full: Tensor | None = None
        covered = 0
        for chunk in stored.overlapping(start, shape):
            low = [max(a, b) for a, b in zip(start, chunk.start)]
            size = [min(a + n, b + m) - x for a, n, b, m, x in zip(start, shape, chunk.start, chunk.shape, low)]
            block = self._read_chunk(chunk, stored.spec.dtype, [x - b for x, b in zip(low, chunk.start)], size)
            covered += block.numel()
            if tuple(size) == tuple(shape):
                return block
            if full is None:
                full = torch.empty(tuple(shape), dtype=stored.spec.dtype)
            full[tuple(slice(x - a, x - a + n) for x, a, n in zip(low, start, size))] = block
        if full is None or covered != full.numel():
            raise UserError(f"checkpoint {str(self.path)!r} holds only a part of {key!r}; it is damaged")
        return full

    def _read_chunk(self, chunk: Chunk, dtype: torch.dtype, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        try:
            file = self._open(chunk.file)
            if chunk not in self._at:
                self._at[chunk] = _data_offset(file, chunk)
            return file.read(self._at[chunk], Spec(dtype, chunk.shape), start, shape)
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


class _Window:
    """A torch.save archive inside a file, as torch's archive reader wants it."""

    def __init__(self, file: RawFile, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self._at = position + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = self._length - self._at
        count = left if count < 0 else min(count, left)
        data = self._file.read_bytes(self._offset + self._at, count)
        self._at += count
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
        at = archive.get_record_offset("data/0")
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{str(file.path)!r}: {chunk.key!r} cannot be read ({' '.join(str(error).split())[:100]}); it is damaged"
        ) from None
    if strides != torch.empty(chunk.shape, device="meta").stride():
        raise UserError(f"{str(file.path)!r}: {chunk.key!r} is not stored row after row; write the checkpoint again")
    return chunk.offset + at


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
        self._stream = open(self._path, "wb", buffering=2**20)  # noqa: SIM115
        self.chunks: list[Chunk] = []

    def write(self, key: str, start: Sequence[int], tensor: Tensor) -> None:
        """tensor: contiguous, and all of its storage."""
        offset = self._stream.tell()
        torch.save(tensor, self._stream)
        shape = tuple(tensor.shape)
        self.chunks.append(Chunk(key, tuple(start), shape, self._name, offset, self._stream.tell() - offset))

    def close(self) -> None:
        """Flushes to disk, then gives the file its name."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self._path, self._path.with_name(self._name))

    def abort(self) -> None:
        """Closes without a flush that would fail again on a full disk."""
        with contextlib.suppress(OSError):
            self._stream.close()


def write_metadata(folder: Path, specs: dict[str, Spec], chunks: list[Chunk]) -> None:
    """What makes the files a checkpoint. Last of all `.metadata`."""
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(BACKEND), encoding="utf-8")
    tensors: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(spec.dtype), torch.Size(spec.shape), [])
        for key, spec in specs.items()
    }
    storage = {}
    for chunk in chunks:
        tensors[chunk.key].chunks.append(ChunkStorageMetadata(torch.Size(chunk.start), torch.Size(chunk.shape)))
        storage[MetadataIndex(chunk.key, chunk.start)] = _StorageInfo(chunk.file, chunk.offset, chunk.length)
    metadata = Metadata(tensors, planner_data={}, storage_data=storage, storage_meta=StorageMeta())
    with open(folder / METADATA, "wb") as stream:
        pickle.dump(metadata, stream)
        stream.flush()
        os.fsync(stream.fileno())
