"""A Megatron checkpoint seen through the weight map: which global
tensor holds what, read as if it were a Hugging Face folder.

The global tensor of a parameter is what a single rank would hold; experts are stacked along a first axis. So every
layout reads every
checkpoint: what differs between layouts is where the global tensors were cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from megarl.checkpoints import hf_files
from megarl.errors import UserError
from megarl.weights.files.hf_folder import CARRIED_TENSORS
from megarl.weights.files.hf_reader import HfReader
from megarl.weights.files.raw_file import Bits, Part, Spec, bytes_of, pieces_of, read_parts
from megarl.weights.files.safetensors_file import SafetensorsFile
from megarl.weights.files.shapes import refuse_shape
from megarl.weights.files.torch_dist import METADATA, TorchDistReader
from megarl.weights.map.layout import Layout
from megarl.weights.map.relations import HfSlice, Piece
from megarl.weights.map.weight_map import Param, WeightMap, load_hf_config
from megarl.weights.rect import Rect, Shape

if TYPE_CHECKING:
    from torch import Tensor

EXPERT = re.compile(r"(.*\.experts\.)local_experts\.(\d+)\.(.*)")
# megatron-core files the norms under the linear they precede, as Transformer Engine fuses them (gpt_layer_specs.py)
FUSED = (
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
)
NOT_WEIGHTS = re.compile(r"optimizer\.|.*_extra_state|.*rng_state")
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")  # padded to a multiple of the writer's TP


@dataclass(frozen=True)
class Global:
    """Where a whole parameter lies: in the global tensor `key` of `shape`, at `lead` on the first axes."""

    key: str
    lead: Shape
    shape: Shape

    def rect(self, local: Rect) -> Rect:
        """A rectangle of the parameter as one of the global tensor."""
        return Rect((*self.lead, *local.offset), (*(1 for _ in self.lead), *local.size))


class Placed(NamedTuple):
    """A piece of a whole parameter, and where the parameter lies."""

    piece: Piece
    where: Global


def global_of(param: Param, num_experts: int) -> Global:
    """`param`: of the only rank of a world of one, so that its layer and expert numbers are global."""
    expert = EXPERT.fullmatch(param.name)
    if not expert:
        key = param.name
        for name, filed in FUSED:
            key = key.replace(name, filed)
        return Global(key, (), param.shape)
    return Global(expert[1] + "experts." + expert[3], (int(expert[2]),), (num_experts, *param.shape))


def whole_params(weight_map: WeightMap) -> list[tuple[Param, Global]]:
    """Every parameter of the model, with its global tensor."""
    alone = Layout()
    return [(param, global_of(param, weight_map.num_experts)) for param in weight_map.params(alone, alone.coord(0))]


def placed_pieces(weight_map: WeightMap) -> dict[str, list[Placed]]:
    """Hugging Face name -> the pieces of it, which lie in one parameter."""
    placed: dict[str, list[Placed]] = {name: [] for name in weight_map.hf_shapes}
    for param, where in whole_params(weight_map):
        for piece in param.pieces:
            placed[piece.hf_name].append(Placed(piece, where))
    return placed


def is_megatron(path: str | Path) -> bool:
    return (Path(path) / METADATA).is_file()


class MegatronReader:
    """The Hugging Face tensors inside a Megatron checkpoint:
    `read(piece)` as HfReader's. UserError for what does not fit the map.
    """

    def __init__(self, path: str | Path, weight_map: WeightMap | None = None) -> None:
        self.path = Path(path)
        if not (self.path / METADATA).is_file():
            raise UserError(
                f"{str(path)!r} has no {METADATA}; give a whole checkpoint, e.g. run.dir/checkpoints/step_N"
            )
        self.weight_map = weight_map or WeightMap(load_hf_config(self.path))
        self._stored = TorchDistReader(self.path)
        carried = hf_files(self.path) / CARRIED_TENSORS
        self._carried = SafetensorsFile(carried) if carried.is_file() else None
        for _, where in whole_params(self.weight_map):
            self._check(where)
        self._placed = placed_pieces(self.weight_map)
        known = {placed.where.key for pieces in self._placed.values() for placed in pieces}
        unknown = sorted(key for key in self._stored.tensors.keys() - known if not NOT_WEIGHTS.match(key))
        if unknown:
            raise UserError(
                f"checkpoint {str(path)!r}: {unknown[0]!r} is unknown to the weight map; its config.json is of "
                "another model"
            )

    def _check(self, where: Global) -> None:
        if where.key not in self._stored.tensors:
            raise UserError(f"checkpoint {str(self.path)!r} lacks {where.key!r}; its config.json is of another model")
        stored = self._stored.tensors[where.key].shape
        if where.key in VOCABULARY and self._padded(where.key, stored, where.shape):
            return

        def shape_of(other: WeightMap) -> Shape:
            return {there.key: there.shape for _, there in whole_params(other)}[where.key]

        refuse_shape(str(self.path), where.key, stored, where.shape, self.weight_map, shape_of)

    def _padded(self, key: str, stored: Shape, wanted: Shape) -> bool:
        """Whether `stored` is `wanted` and rows of padding, which are zero and stay so in training."""
        rows = stored[0] - wanted[0]
        if rows <= 0 or stored[1:] != wanted[1:]:
            return False
        padding = self._stored.read(key, Rect((wanted[0], 0), (rows, stored[1])))
        return not (padding << 1).any()  # without the sign

    def __enter__(self) -> MegatronReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stored.close()
        if self._carried:
            self._carried.close()

    def carried(self, weight_map: WeightMap) -> list[str]:
        """Tensors to copy to an export as they are, as HfReader.carried."""
        return sorted(self._carried.tensors) if self._carried else []

    def spec(self, name: str) -> Spec:
        if self._carried and name in self._carried.tensors:
            return self._carried.tensors[name]
        return Spec(self._stored.tensors[self._placed[name][0].where.key].dtype, self.weight_map.hf_shapes[name])

    def whole_bits(self, name: str) -> Bits:
        rect = Rect.whole(self.spec(name).shape)
        if self._carried and name in self._carried.tensors:
            return self._carried.read(name, rect)
        return self.bits(HfSlice(name, rect))

    def specs(self) -> dict[str, Spec]:
        """The Hugging Face tensors it holds, in the map's order, as they are stored."""
        return {name: self.spec(name) for name in self.weight_map.hf_shapes}

    def read(self, piece: HfSlice) -> Tensor:
        """A rectangle of a Hugging Face tensor, in the dtype that the checkpoint holds it in."""
        from megarl.weights.files.tensors import tensor_of

        return tensor_of(self.bits(piece), self.spec(piece.hf_name).dtype)

    def bits(self, piece: HfSlice) -> Bits:
        """The bits of `read`."""
        with self._stored.deletion_named():
            bits = read_parts(piece.rect, self._parts(piece))
        if bits is None:
            raise self._incomplete(piece.hf_name)
        return bits

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of whole_bits(), in order; each piece is gone with the next."""
        if self._carried and name in self._carried.tensors:
            yield bytes_of(self.whole_bits(name))
            return
        rect = Rect.whole(self.weight_map.hf_shapes[name])
        with self._stored.deletion_named():
            pieces = pieces_of(rect, self._parts(HfSlice(name, rect)))
            if pieces is None:
                raise self._incomplete(name)
            yield from pieces

    def _incomplete(self, name: str) -> UserError:
        return UserError(f"checkpoint {str(self.path)!r} holds only a part of {name!r}; it is damaged")

    def _parts(self, piece: HfSlice) -> Iterator[Part]:
        """Of all chunks, as rectangles of the Hugging Face tensor."""
        for placed, where in self._placed[piece.hf_name]:
            if rect := piece.rect.intersect(placed.rect):
                there = where.rect(rect.within(placed.rect).moved(placed.offset))
                for part in self._stored.parts(where.key, there):
                    local, lead = part.rect.within(there), len(where.lead)
                    yield replace(part, rect=Rect(local.offset[lead:], local.size[lead:]).moved(rect.offset))


def open_weights(path: str | Path, weight_map: WeightMap) -> HfReader | MegatronReader:
    """The reader of whichever kind of folder `path` is."""
    return MegatronReader(path, weight_map) if is_megatron(path) else HfReader(path)


@dataclass(frozen=True)
class NewChunk:
    """The rectangle `rect` of the global tensor `key`, to be written as one chunk. pieces: what fills it; their places
    in the chunk leave out `lead`, the first axes of size 1 on which experts are stacked.
    """

    key: str
    rect: Rect
    lead: int
    pieces: tuple[Piece, ...]


def chunks_of_rank(
    weight_map: WeightMap, layout: Layout, rank: int, placed: dict[str, list[Placed]]
) -> Iterator[NewChunk]:
    """The chunks that `rank` of `layout` contributes, each content once
    over all ranks; padding of the vocabulary is left out.
    """
    for param in weight_map.params(layout, layout.coord(rank)):
        if param.replica:
            continue
        groups: dict[Shape, list[Piece]] = {}  # by how far the whole parameter's place is from that in the rank's own
        for piece in param.pieces:
            where, whole = _find(piece, placed[piece.hf_name])
            groups.setdefault(whole.within(piece.local).offset, []).append(piece)
        for shift, pieces in groups.items():
            local = Rect.around([piece.local for piece in pieces])
            if local.numel != sum(piece.rect.numel for piece in pieces):
                raise RuntimeError(f"{param.name}: its pieces leave gaps")
            inside = (Piece(piece.hf_name, piece.rect, piece.local.within(local).offset) for piece in pieces)
            yield NewChunk(where.key, where.rect(local.moved(shift)), len(where.lead), tuple(inside))


def _find(piece: Piece, placed: list[Placed]) -> tuple[Global, Rect]:
    """The parameter that holds a rank's piece, and where in the whole of it."""
    for whole, where in placed:
        if piece.rect.intersect(whole.rect) == piece.rect:
            return where, piece.rect.within(whole.rect).moved(whole.offset)
    raise RuntimeError(f"{piece} crosses the pieces of its parameter")
