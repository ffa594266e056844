"""Safetensors files, read and written by rectangle: memory for one tensor, whatever the size of the file.

The library writes whole dictionaries, and its get_slice maps whole files: of 512 MB read one tensor at a time 516 MB
stay resident, here 34 MB (it is quicker: 0.2 to 0.4 s of CPU against 0.5 to 0.9). The format is told in
safetensors_header.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from megarl.weights.files.disk_file import DiskFile
from megarl.weights.files.raw_file import Bits, Part, RawFile, Spec, bytes_of
from megarl.weights.files.safetensors_header import Entry, read_header
from megarl.weights.rect import Rect

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """`tensors` maps names to Spec. Raises UserError where the file is no whole safetensors file."""

    def __init__(self, path: Path, header: Mapping[str, Entry] | None = None) -> None:
        """header: of the file, where it is known."""
        self._entries = read_header(path) if header is None else header
        self.tensors = {name: Spec(DTYPES[entry.dtype], entry.shape) for name, entry in self._entries.items()}
        self._file = RawFile(path)

    def read(self, name: str, rect: Rect) -> Bits:
        return self.part(name, rect).read()

    def part(self, name: str, inside: Rect) -> Part:
        """What read() reads."""
        return Part(inside, lambda: self._file, self._entries[name].offset, self.tensors[name], inside)

    def close(self) -> None:
        self._file.close()


class SafetensorsWriter:
    """Writes the tensors of `specs`, which may come in any order; `close` checks that all of them came."""

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        self.path = path
        self._specs = dict(specs)
        self._missing = set(specs)
        self._offsets: dict[str, int] = {}
        end = 0
        for name in sorted(
            specs, key=lambda name: -specs[name].itemsize
        ):  # stable; wide types first, so that all are aligned
            self._offsets[name] = end
            end += specs[name].nbytes
        entries = {
            name: {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, begin + spec.nbytes]}
            for name, begin in self._offsets.items()
            for spec in [specs[name]]
        }
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._data = 8 + len(header)
        self._file = DiskFile(path)
        self._file.write(len(header).to_bytes(8, "little") + header)

    def write(self, name: str, bits: Bits) -> None:
        spec = self._specs[name]
        if bits.dtype != spec.bits or bits.shape != spec.shape:
            raise ValueError(f"{name}: {bits.dtype} {bits.shape} is not {spec}")
        self.write_pieces(name, [bytes_of(bits)] if bits.size else [])

    def write_pieces(self, name: str, pieces: Iterable[memoryview]) -> None:
        """The bytes of tensor `name`, in order. Raises ValueError where they are more or fewer."""
        begin = at = self._data + self._offsets[name]
        for piece in pieces:
            self._file.write_at(at, piece)
            at += len(piece)
        if at - begin != self._specs[name].nbytes:
            raise ValueError(f"{name}: {at - begin} bytes came, it has {self._specs[name].nbytes}")
        self._missing.discard(name)

    def close(self) -> None:
        """Flushes to disk. Raises ValueError where a tensor is missing."""
        if self._missing:
            raise ValueError(f"{self.path}: {sorted(self._missing)[0]} was never written")
        self._file.close()

    def abort(self) -> None:
        self._file.abort()
