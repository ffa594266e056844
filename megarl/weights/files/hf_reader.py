"""Reading rectangles of a Hugging Face folder without reading whole tensors."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.weights.files.hf_extras import SCALE, block_size, carried, dequantized
from megarl.weights.files.safetensors_file import SafetensorsFile, Spec
from megarl.weights.map.relations import Piece
from megarl.weights.map.weight_map import WeightMap, load_hf_config

INDEX = "model.safetensors.index.json"


class HfReader:
    """Opens the folder's safetensors lazily. `with HfReader(path) as reader: reader.read(piece)`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, SafetensorsFile] = {}
        self._where = self._index()
        self._block = block_size(load_hf_config(self.path))

    def _index(self) -> dict[str, str]:
        if (self.path / INDEX).is_file():
            try:
                return json.loads((self.path / INDEX).read_text())["weight_map"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{str(self.path / INDEX)!r} is not an index of safetensors; copy the checkpoint again"
                ) from None
        single = self.path / "model.safetensors"
        if not single.is_file():
            raise UserError(
                f"model.path {str(self.path)!r} holds neither model.safetensors nor {INDEX}; give a Hugging Face "
                "checkpoint folder"
            )
        return dict.fromkeys(self._open(single.name).tensors, single.name)

    def __enter__(self) -> HfReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def specs(self, weight_map: WeightMap) -> dict[str, Spec]:
        """Every tensor of the map, in its order, as `read` gives it.
        UserError names one that is missing, unknown, or of another shape.
        """
        self.carried(weight_map)
        found = {}
        for name, shape in weight_map.hf_shapes.items():
            found[name] = self.spec(name)
            if found[name].shape != shape:
                raise UserError(
                    f"tensor {name!r} in {str(self.path)!r} has shape {found[name].shape}, config.json wants {shape}"
                )
        return found

    def spec(self, name: str) -> Spec:
        spec = self._file(name).tensors[name]
        return Spec(torch.bfloat16, spec.shape) if self._scaled(name) else spec

    def carried(self, weight_map: WeightMap) -> list[str]:
        """Tensors to copy to an export as they are (megarl.weights.files.hf_extras.carried).
        UserError where the map and the files differ.
        """
        return carried(self._where.keys(), weight_map)

    def whole(self, name: str) -> Tensor:
        """A whole tensor, its shape being the file's; dequantised as in `read`."""
        shape = self._file(name).tensors[name].shape
        zero = (0,) * len(shape)
        return self.read(Piece(name, zero, zero, shape))

    def read(self, piece: Piece) -> Tensor:
        """A rectangle in the file's dtype; bfloat16 where the file holds block-FP8."""
        if self._block is not None and self._scaled(piece.hf):
            return dequantized(self._stored, piece, self._block)
        return self._stored(piece)

    def _scaled(self, name: str) -> bool:
        return self._block is not None and name + SCALE in self._where

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._where:
            raise UserError(
                f"tensor {name!r} is missing from {str(self.path)!r}; the checkpoint does not match its config.json"
            )
        file = self._open(self._where[name])
        if name not in file.tensors:
            raise UserError(
                f"{str(self.path / self._where[name])!r} lacks tensor {name!r}, which the index places there; copy it "
                "again"
            )
        return file

    def _open(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            self._files[name] = SafetensorsFile(self.path / name)
        return self._files[name]

    def _stored(self, piece: Piece) -> Tensor:
        file = self._file(piece.hf)
        shape = file.tensors[piece.hf].shape
        end = [a + n for a, n in zip(piece.hf_start, piece.shape)]
        if len(shape) != len(end) or any(have < want for have, want in zip(shape, end)):
            raise UserError(
                f"tensor {piece.hf!r} has shape {shape}, too small for {end}; config.json does not match the weights"
            )
        return file.read(piece.hf, piece.hf_start, piece.shape)
