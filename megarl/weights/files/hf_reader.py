"""Reading rectangles of a Hugging Face folder without reading whole tensors.

Which files count is transformers' rule: model.safetensors alone where it exists, else what the index names. A folder
with a single safetensors file of another name is read too.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.weights.files.hf_extras import SCALE, block_size, carried, dequantized
from megarl.weights.files.safetensors_file import SafetensorsFile, Spec
from megarl.weights.files.shapes import refuse_shape
from megarl.weights.map.relations import Piece, Shape
from megarl.weights.map.weight_map import WeightMap, load_hf_config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HfReader:
    """Opens the folder's safetensors lazily. `with HfReader(path) as reader: reader.read(piece)`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, SafetensorsFile] = {}
        self._where = self._index()
        self._block = block_size(load_hf_config(self.path))

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name."""
        found = sorted(file.name for file in self.path.glob("*.safetensors"))
        if (self.path / INDEX).is_file() and SINGLE not in found:
            return self._read_index(found)
        if SINGLE not in found and len(found) != 1:
            has = f"{len(found)} safetensors files but no {INDEX}" if found else "no *.safetensors"
            raise UserError(
                f"model.path {str(self.path)!r} has {has}; save it with safe_serialization, or copy it again"
            )
        file = SINGLE if SINGLE in found else found[0]
        return dict.fromkeys(self._open(file).tensors, file)

    def _read_index(self, found: list[str]) -> dict[str, str]:
        try:
            where: dict[str, str] = dict(json.loads((self.path / INDEX).read_text())["weight_map"].items())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{str(self.path / INDEX)!r} is not an index of safetensors; copy the checkpoint again"
            ) from None
        if missing := sorted(set(where.values()) - set(found)):
            raise UserError(
                f"model.path {str(self.path)!r} lacks {missing[0]}, which its index names; copy the checkpoint again"
            )
        return where

    @property
    def files(self) -> list[str]:
        """Names of the files that hold its tensors."""
        return sorted(set(self._where.values()))

    @property
    def left_aside(self) -> str | None:
        """One line where the folder holds an index that is not followed."""
        if self.files != [SINGLE] or not (self.path / INDEX).is_file():
            return None
        return f"{str(self.path)!r}: reads {SINGLE}, as transformers does, and leaves {INDEX} aside"

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
        return {name: self.spec(name) for name in weight_map.hf_shapes}

    def spec(self, name: str) -> Spec:
        spec = self._file(name).tensors[name]
        return Spec(torch.bfloat16, spec.shape) if self._scaled(name) else spec

    def carried(self, weight_map: WeightMap) -> list[str]:
        """Tensors to copy to an export as they are (megarl.weights.files.hf_extras.carried). Reads headers alone.

        UserError where the map and the files differ: a tensor that is missing, unknown, or of another shape.
        """
        for name, shape in weight_map.hf_shapes.items():
            if name in self._where:
                self._check_shape(weight_map, name, shape)
        return carried(self._where.keys(), weight_map)

    def _check_shape(self, weight_map: WeightMap, name: str, shape: Shape) -> None:
        found = self._file(name).tensors[name].shape
        refuse_shape(str(self.path), name, found, shape, weight_map, lambda other: other.hf_shapes[name])
        if self._block is not None and self._scaled(name):
            blocks = tuple(-(-n // size) for n, size in zip(shape, self._block))
            found = self._file(name + SCALE).tensors[name + SCALE].shape
            refuse_shape(str(self.path), name + SCALE, found, blocks, weight_map, lambda _: blocks)

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
