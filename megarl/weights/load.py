"""Reading rectangles of a Hugging Face folder without reading whole tensors."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megarl.errors import UserError
from megarl.weights.relations import Piece
from megarl.weights.source import SCALE, block_size, carried, dequantized
from megarl.weights.weight_map import WeightMap, load_hf_config

INDEX = "model.safetensors.index.json"


class HfReader:
    """Opens the folder's safetensors lazily. `with HfReader(path) as reader: reader.read(piece)`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._where = self._index()
        self._block = block_size(load_hf_config(self.path))

    def _index(self) -> dict[str, str]:
        if (self.path / INDEX).is_file():
            return json.loads((self.path / INDEX).read_text())["weight_map"]
        single = self.path / "model.safetensors"
        if not single.is_file():
            raise UserError(
                f"model.path {str(self.path)!r} holds neither model.safetensors nor {INDEX}; give a Hugging Face checkpoint folder"
            )
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single.name)

    def __enter__(self) -> HfReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def carried(self, weight_map: WeightMap) -> list[str]:
        """Tensors to copy to an export as they are (megarl.weights.source.carried). UserError where the map and the files differ."""
        return carried(self._where.keys(), weight_map)

    def whole(self, name: str) -> Tensor:
        """A whole tensor, its shape being the file's; dequantised as in `read`."""
        shape = tuple(self._file(name).get_slice(name).get_shape())
        zero = (0,) * len(shape)
        return self.read(Piece(name, zero, zero, shape))

    def read(self, piece: Piece) -> Tensor:
        """A rectangle in the file's dtype; bfloat16 where the file holds block-FP8."""
        if piece.hf + SCALE in self._where and self._block is not None:
            return dequantized(self._stored, piece, self._block)
        return self._stored(piece)

    def _file(self, name: str) -> Any:
        if name not in self._where:
            raise UserError(f"tensor {name!r} is missing from {str(self.path)!r}; the checkpoint does not match its config.json")
        file = self._where[name]
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self.path / file, "pt"))
        return self._files[file]

    def _stored(self, piece: Piece) -> Tensor:
        view = self._file(piece.hf).get_slice(piece.hf)
        end = [a + n for a, n in zip(piece.hf_start, piece.shape)]
        if any(have < want for have, want in zip(view.get_shape(), end)):
            raise UserError(
                f"tensor {piece.hf!r} has shape {view.get_shape()}, too small for {end}; config.json does not match the weights"
            )
        return view[tuple(slice(a, b) for a, b in zip(piece.hf_start, end))]
