"""The binary body of our HTTP answers: arrays travel as raw bytes, never as JSON lists
(docs/routing.md, "Transport").
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

ENGINE_DIED = "vLLM's engine died; the worker's log says why"  # a server's answer while it goes down


def encode(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """Little-endian: uint32 length of the JSON header, the header, then
    each array's bytes in the order of header["arrays"].
    """
    layout = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    text = json.dumps({**header, "arrays": layout}, separators=(",", ":")).encode()
    return b"".join(
        [struct.pack("<I", len(text)), text, *(np.ascontiguousarray(array).tobytes() for array in arrays.values())]
    )


def decode(body: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Inverse of encode; the arrays are read-only views of `body`. Raises ValueError when the body is cut short."""
    (length,) = struct.unpack_from("<I", body)
    header = json.loads(body[4 : 4 + length])
    offset = 4 + length
    arrays = {}
    for name, dtype, shape in header.pop("arrays"):
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(body, dtype, count, offset).reshape(shape)
        offset += arrays[name].nbytes
    return header, arrays
