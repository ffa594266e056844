"""Files of rows, one JSON object a line: written whole or not at all."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def rows_to(path: str | Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives what writes one row; the file has its name when the block ends well."""
    partial = Path(f"{path}.partial")
    with partial.open("w", encoding="utf-8") as file:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")

        yield write
    os.replace(partial, path)


def encode_npy(array: np.ndarray) -> str:
    """base64 of the array in numpy's .npy format."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()
