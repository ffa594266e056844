"""Reading rectangles of a Hugging Face folder without reading whole tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from megarl.errors import UserError
from megarl.weights.files.hf_extras import DEQUANTIZED, dequantized
from megarl.weights.files.hf_index import HfIndex
from megarl.weights.files.raw_file import Bits, Part, Spec, bytes_of, pieces_of, put_together
from megarl.weights.files.safetensors_file import DTYPES, SafetensorsFile
from megarl.weights.map.relations import HfSlice
from megarl.weights.map.weight_map import WeightMap
from megarl.weights.rect import Rect

if TYPE_CHECKING:
    from torch import Tensor


class HfReader:
    """Opens the folder's safetensors lazily. `with HfReader(path) as reader: reader.read(piece)`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = HfIndex(path)
        self._files: dict[str, SafetensorsFile] = {}

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
        entry = self.index.entry(name)
        return Spec(DEQUANTIZED if self.index.scaled(name) else DTYPES[entry.dtype], entry.shape)

    def carried(self, weight_map: WeightMap) -> list[str]:
        """Tensors to copy to an export as they are. UserError where the map and the files differ (HfIndex.carried)."""
        return self.index.carried(weight_map)

    def whole(self, name: str) -> Tensor:
        """A whole tensor, its shape being the file's; dequantised as in `read`."""
        return self.read(self._whole(name))

    def whole_bits(self, name: str) -> Bits:
        """The bits of `whole`."""
        return self.bits(self._whole(name))

    def _whole(self, name: str) -> HfSlice:
        return HfSlice(name, Rect.whole(self.index.entry(name).shape))

    def read(self, piece: HfSlice) -> Tensor:
        """A rectangle in the file's dtype; bfloat16 where the file holds block-FP8."""
        from megarl.weights.files.tensors import tensor_of

        return tensor_of(self.bits(piece), self.spec(piece.hf_name).dtype)

    def bits(self, piece: HfSlice) -> Bits:
        """The bits of `read`."""
        if self.index.block is None or not self.index.scaled(piece.hf_name):
            return self._stored(piece)
        from megarl.weights.files.tensors import bits_of, tensor_of

        def stored(piece: HfSlice) -> Tensor:
            return tensor_of(self._stored(piece), DTYPES[self.index.entry(piece.hf_name).dtype])

        return bits_of(dequantized(stored, piece, self.index.block))

    def pieces(self, rect: Rect, parts: Iterable[tuple[Rect, HfSlice]]) -> Iterator[memoryview]:
        """The bytes of the array of `rect`, in order, from slices of tensors, each with its place in it; each piece is
        gone with the next.
        """
        parts = list(parts)
        if any(self.index.scaled(piece.hf_name) for _, piece in parts):
            bits = put_together(rect, ((place, self.bits(piece)) for place, piece in parts))
            assert bits is not None, parts
            return iter([bytes_of(bits)])
        pieces = pieces_of(rect, [replace(self._part(piece), rect=place) for place, piece in parts])
        assert pieces is not None, parts
        return pieces

    def _stored(self, piece: HfSlice) -> Bits:
        return self._part(piece).read()

    def _part(self, piece: HfSlice) -> Part:
        shape = self.index.entry(piece.hf_name).shape
        end = piece.rect.end
        if len(shape) != len(end) or any(have < want for have, want in zip(shape, end, strict=True)):
            raise UserError(
                f"tensor {piece.hf_name!r} has shape {shape}, too small for {list(end)}; config.json does not match "
                "the weights"
            )
        file = self.index.where[piece.hf_name]
        if file not in self._files:
            self._files[file] = SafetensorsFile(self.path / file, self.index.header(file))
        return self._files[file].part(piece.hf_name, piece.rect)
