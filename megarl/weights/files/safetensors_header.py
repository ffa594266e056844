"""The header of a safetensors file: names, dtypes, shapes and places of its tensors. Imports no torch.

Format: 8 bytes little-endian length of the header, a JSON header {name: {dtype, shape, data_offsets: [begin, end]
behind the header}}, the tensors' bytes without gaps (safetensors README).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from megarl.errors import UserError

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
BYTES |= {"U8": 1, "BOOL": 1}  # of an element
LONGEST_HEADER = 100_000_000  # bytes; the library's own limit


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: `offset` is its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> dict[str, Entry]:
    """Raises UserError where the file is missing, cut short, or no safetensors file."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or (2 <= length <= LONGEST_HEADER and size < 8 + length):
                raise _truncated(path, size, 8 + length)
            if not 2 <= length <= LONGEST_HEADER:
                raise ValueError("length of the header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size < end:
            raise _truncated(path, size, end)
        unknown = [(name, entry["dtype"]) for name, entry in header.items() if entry["dtype"] not in BYTES]
        if unknown:
            raise UserError(f"{str(path)!r}: tensor {unknown[0][0]!r} is {unknown[0][1]}, which megarl does not read")
        return {name: _entry(entry, 8 + length) for name, entry in header.items()}
    except FileNotFoundError:
        raise UserError(f"{str(path)!r} is missing; copy the checkpoint again") from None
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{str(path)!r} is not a safetensors file; copy the checkpoint again") from None


def _entry(entry: dict, data: int) -> Entry:
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * BYTES[entry["dtype"]]:
        raise ValueError("size of a tensor")
    return Entry(entry["dtype"], shape, data + begin)


def _truncated(path: Path, size: int, needed: int) -> UserError:
    return UserError(f"{str(path)!r} is truncated: {size} of {needed} bytes; copy the checkpoint again")
