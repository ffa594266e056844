"""How a parameter of one tensor-parallel rank lies in Hugging Face
tensors. Each relation says too how vLLM cuts the same tensors.

A relation is called with the names and whole shapes of the tensors it spans and the
rank's place among those that split them; it returns the rank's shard of the parameter.
`Rank` is of the expert tensor-parallel group for a routed expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megarl.weights.rect import Rect, Shape


@dataclass(frozen=True, slots=True)
class HfSlice:
    """The rectangle `rect` of the Hugging Face tensor `hf_name`."""

    hf_name: str
    rect: Rect

    def __str__(self) -> str:
        return f"{self.hf_name}{self.rect}"


@dataclass(frozen=True, slots=True)
class Piece(HfSlice):
    """A slice, and where it lies in a rank's parameter: there it begins at `offset`."""

    offset: Shape

    @property
    def local(self) -> Rect:
        """The rectangle of the parameter."""
        return Rect(self.offset, self.rect.size)


@dataclass(frozen=True, slots=True)
class ParamShard:
    """A rank's part of a parameter: its local shape and the pieces that fill it."""

    shape: Shape
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Rank:
    """How many ways a parameter is split, and which part is ours."""

    size: int
    index: int


class Relation(Protocol):
    def __call__(self, hf_names: tuple[str, ...], shapes: tuple[Shape, ...], rank: Rank) -> ParamShard: ...


@dataclass(frozen=True)
class Replicated:
    """Every rank holds all of it. vLLM too: norms, routers and their biases, MLA's down
    projections (ReplicatedLinear).
    """

    def __call__(self, hf_names: tuple[str, ...], shapes: tuple[Shape, ...], rank: Rank) -> ParamShard:
        whole = Rect.whole(shapes[0])
        return ParamShard(shapes[0], (Piece(hf_names[0], whole, whole.offset),))


@dataclass(frozen=True)
class Split:
    """One tensor, cut evenly along `axis`. vLLM: the same along the same axis (ColumnParallelLinear 0,
    RowParallelLinear and w2 1).
    """

    axis: int

    def __call__(self, hf_names: tuple[str, ...], shapes: tuple[Shape, ...], rank: Rank) -> ParamShard:
        size, offset = list(shapes[0]), [0] * len(shapes[0])
        size[self.axis] //= rank.size
        offset[self.axis] = rank.index * size[self.axis]
        rect = Rect(tuple(offset), tuple(size))
        return ParamShard(rect.size, (Piece(hf_names[0], rect, (0,) * len(size)),))


@dataclass(frozen=True)
class Stacked:
    """gate and up projections: each cut along its rows, then one above the other. vLLM: the same
    (MergedColumnParallelLinear, w13).
    """

    def __call__(self, hf_names: tuple[str, ...], shapes: tuple[Shape, ...], rank: Rank) -> ParamShard:
        (rows, columns) = shapes[0]
        rows //= rank.size
        rect = Rect((rank.index * rows, 0), (rows, columns))
        pieces = tuple(Piece(name, rect, (i * rows, 0)) for i, name in enumerate(hf_names))
        return ParamShard((len(hf_names) * rows, columns), pieces)


@dataclass(frozen=True)
class GroupedQkv:
    """Query heads of a group, its key, its value; group after group
    (megatron-core's order). `queries` are heads a group.

    Weights and biases alike. vLLM: the same heads, but all queries, all keys, all values; keys and values are
    replicated where there are more ranks than groups (QKVParallelLinear).
    """

    groups: int
    queries: int
    head_dim: int

    def __call__(self, hf_names: tuple[str, ...], shapes: tuple[Shape, ...], rank: Rank) -> ParamShard:
        columns = shapes[0][1:]
        zero = (0,) * len(columns)
        queries, copies = self.queries, 1
        if (
            rank.size > self.groups
        ):  # so many ranks share the key and value of a group, each with its own of the group's queries
            copies = rank.size // self.groups
            queries //= copies
        pieces: list[Piece] = []
        row = 0
        blocks = self.groups * copies
        for block in range(rank.index * blocks // rank.size, (rank.index + 1) * blocks // rank.size):
            group = block // copies
            for name, first, heads in zip(hf_names, (block * queries, group, group), (queries, 1, 1), strict=True):
                rect = Rect((first * self.head_dim, *zero), (heads * self.head_dim, *columns))
                pieces.append(Piece(name, rect, (row, *zero)))
                row += rect.size[0]
        return ParamShard((row, *columns), tuple(pieces))


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary, padded at its end to a multiple of the
    ranks and cut evenly; padding rows hold zeros and are in no piece.

    multiple: the vocabulary is padded to a multiple of so many rows
    first. vLLM: 64 (VocabParallelEmbedding), so its cuts lie elsewhere.
    """

    multiple: int = 1

    def __call__(self, hf_names: tuple[str, ...], shapes: tuple[Shape, ...], rank: Rank) -> ParamShard:
        vocab, columns = shapes[0]
        rows = -(-vocab // self.multiple) * self.multiple
        rows = -(-rows // rank.size)
        rect = Rect((rank.index * rows, 0), (rows, columns)).intersect(Rect.whole(shapes[0]))
        return ParamShard((rows, columns), (Piece(hf_names[0], rect, (0, 0)),) if rect else ())
