"""Safetensors files, read and written by rectangle: memory for one tensor, whatever the size of the file.

The library maps whole files and writes whole dictionaries; a conversion may do neither. The format is told in
safetensors_header.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.weights.files.safetensors_header import Entry, read_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """What a tensor is, without its content."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


class RawFile:
    """A file of row-major arrays, read by position. Raises UserError where the file is missing or ends too early."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{str(path)!r} is missing; copy the checkpoint again") from None
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from None
        self.size = os.fstat(self._handle).st_size

    def close(self) -> None:
        os.close(self._handle)

    def read_bytes(self, offset: int, count: int) -> bytes:
        data = bytearray(count)
        self._fill(memoryview(data), offset)
        return bytes(data)

    def read(self, offset: int, spec: Spec, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The rectangle [start, start + shape) of the array of `spec` at byte `offset`.

        Reads whole rows of the first axis that has more than one: of a
        stacked expert's gate and up, only the half that is asked for.
        """
        if not spec.shape:
            start, shape, rows, inner = (), (), 1, 1
        elif len(spec.shape) > 1 and spec.shape[0] == 1:
            return self.read(offset, Spec(spec.dtype, spec.shape[1:]), start[1:], shape[1:]).unsqueeze(0)
        else:
            rows, inner = shape[0], math.prod(spec.shape[1:])
        block = torch.empty((rows, *spec.shape[1:]) if spec.shape else (), dtype=spec.dtype)
        skip = start[0] * inner if start else 0
        if block.numel():
            self._fill(bytes_of(block), offset + skip * spec.dtype.itemsize)
        if tuple(shape[1:]) == spec.shape[1:]:
            return block
        return block[(slice(None), *(slice(a, a + n) for a, n in zip(start[1:], shape[1:])))].contiguous()

    def _fill(self, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._handle, [target[done:]], offset + done)
            if not count:
                raise UserError(
                    f"{str(self.path)!r} is truncated: it ends at byte {offset + done}; copy the checkpoint again"
                )
            done += count


class SafetensorsFile:
    """`tensors` maps names to Spec. Raises UserError where the file is no whole safetensors file."""

    def __init__(self, path: Path, header: Mapping[str, Entry] | None = None) -> None:
        """header: of the file, where it is known."""
        self._entries = read_header(path) if header is None else header
        self.tensors = {name: Spec(DTYPES[entry.dtype], entry.shape) for name, entry in self._entries.items()}
        self._file = RawFile(path)

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        return self._file.read(self._entries[name].offset, self.tensors[name], start, shape)

    def close(self) -> None:
        self._file.close()


class SafetensorsWriter:
    """Writes the tensors of `specs`, which may come in any order; `close` checks that all of them came."""

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        self.path = path
        self._specs = dict(specs)
        self._missing = set(specs)
        self._offsets: dict[str, int] = {}
        at = 0
        for name in sorted(
            specs, key=lambda name: -specs[name].dtype.itemsize
        ):  # stable; wide types first, so that all are aligned
            self._offsets[name] = at
            at += specs[name].nbytes
        entries = {
            name: {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, begin + spec.nbytes]}
            for name, begin in self._offsets.items()
            for spec in [specs[name]]
        }
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._data = 8 + len(header)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write(memoryview(len(header).to_bytes(8, "little") + header), 0)

    def write(self, name: str, tensor: Tensor) -> None:
        spec = self._specs[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not {spec}")
        if tensor.numel():
            self._write(bytes_of(tensor.detach().cpu().contiguous()), self._data + self._offsets[name])
        self._missing.discard(name)

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._handle, data[done:], offset + done)

    def close(self) -> None:
        """Flushes to disk. Raises ValueError where a tensor is missing."""
        if self._missing:
            raise ValueError(f"{self.path}: {sorted(self._missing)[0]} was never written")
        os.fsync(self._handle)
        self.abort()

    def abort(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
