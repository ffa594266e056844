"""The binary body of our HTTP answers: arrays travel as raw bytes, never as JSON lists
(docs/routing.md, "Transport").
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

ENGINE_DIED = "vLLM's engine died; the worker's log says why"  # a server's answer while it goes down
SMALL, JOINED = 65536, 1 << 20  # bytes
WHOLE = ("stop", "length")  # the finish reasons of what was sampled to its end


def encode(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """Little-endian: uint32 length of the JSON header, the header, then
    each array's bytes in the order of header["arrays"].
    """
    return b"".join(encode_parts(header, {name: [array] for name, array in arrays.items()}))


def encode_parts(header: dict[str, Any], arrays: dict[str, list[np.ndarray]]) -> list[bytes | memoryview]:
    """What encode gives, in few parts, of which large ones are not copied. Each array is given as pieces along its
    first axis, at least one.
    """
    layout = [
        [name, pieces[0].dtype.str, [sum(len(piece) for piece in pieces), *pieces[0].shape[1:]]]
        for name, pieces in arrays.items()
    ]
    text = json.dumps({**header, "arrays": layout}, separators=(",", ":")).encode()
    parts = [np.ascontiguousarray(piece) for pieces in arrays.values() for piece in pieces if piece.size]
    return _joined([struct.pack("<I", len(text)), text, *(piece.reshape(-1).view(np.uint8).data for piece in parts)])


def _joined(parts: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """The same bytes, small parts in a row as one, of some JOINED bytes: each is a call to the kernel."""
    joined: list[bytes | memoryview] = []
    small, held = list[bytes | memoryview](), 0
    for part in parts:
        large = len(part) >= SMALL
        if not large:
            small.append(part)
            held += len(part)
        if large or held >= JOINED:
            joined += [b"".join(small), *([part] if large else [])]
            small, held = [], 0
    return [part for part in [*joined, b"".join(small)] if part]


def refusal_of(status: int, content: bytes) -> str:
    """What an answer other than 200 says, in one line."""
    try:
        return json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return f"status {status}: {content[:200].decode(errors='replace')}"


def decode(body: bytes | memoryview) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Inverse of encode; the arrays are read-only views of `body`. Raises ValueError when the body is cut short."""
    (length,) = struct.unpack_from("<I", body)
    header = json.loads(bytes(body[4 : 4 + length]))
    offset = 4 + length
    arrays = {}
    for name, dtype, shape in header.pop("arrays"):
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(body, dtype, count, offset).reshape(shape)
        offset += arrays[name].nbytes
    return header, arrays
