"""The rows that `megarl score` is given. Imports no engine, so that a wrong row is named before anything starts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megarl.config import Config
from megarl.errors import UserError
from megarl.replay.routes import accept_routes
from megarl.weights.map.weight_map import WeightMap


def check_rows(path: Path, config: Config, weight_map: WeightMap) -> None:
    """Raises UserError, naming the first wrong line, or for a file without rows."""
    if not sum(1 for _ in read_rows(path, config, weight_map)):
        raise UserError(f"--input {str(path)!r} holds no rows")


def count_rows(path: Path) -> int:
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def read_rows(path: Path, config: Config, weight_map: WeightMap) -> Iterator[dict[str, Any]]:
    """The rows one by one, routes decoded; UserError names the first wrong line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _row(f"{path} line {number}", line, config, weight_map)


def _row(name: str, line: bytes, config: Config, weight_map: WeightMap) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
        tokens = row["tokens"]
        if not (isinstance(tokens, list) and len(tokens) >= 2 and all(isinstance(t, int) for t in tokens)):
            raise ValueError("'tokens' is not a list of at least two token ids")
        if not 0 <= min(tokens) <= max(tokens) < weight_map.vocab_size:
            raise ValueError(f"a token lies outside the vocabulary of {weight_map.vocab_size}")
        if row.get("routes") is not None:
            row["routes"] = _routes(row["routes"], len(tokens) - 1, weight_map)
    except (ValueError, KeyError, TypeError) as error:
        what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{name}: {what}; a row is {{'tokens', 'prompt_len', 'routes'?}}") from None
    if row.get("routes") is not None and config.replay_mode == "none":
        raise UserError(f"{name} has routes, but replay.mode is none; set replay.mode=R3 or drop them")
    return row


def _routes(text: str, rows: int, weight_map: WeightMap) -> np.ndarray:
    try:
        routes = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
        return accept_routes(
            routes, rows, weight_map.moe_layers, weight_map.num_layers, weight_map.num_experts, weight_map.top_k
        )
    except (ValueError, TypeError, EOFError, AttributeError) as error:
        raise ValueError(f"'routes': {error}") from None
