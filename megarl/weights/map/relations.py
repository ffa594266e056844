"""How a parameter of one tensor-parallel rank lies in Hugging Face
tensors. Each relation says too how vLLM cuts the same tensors.

A relation is called with the names and whole shapes of the tensors it spans and the
rank's place among those that split them; it returns the local shape and the rectangles
(`Piece`) that fill it. `Rank` is of the expert tensor-parallel group for a routed expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

Shape = tuple[int, ...]
Cut = tuple[Shape, list["Piece"]]


@dataclass(frozen=True)
class Piece:
    """A rectangle: hf[hf_start : hf_start + shape] equals local[start : start + shape] on every axis."""

    hf: str
    hf_start: Shape
    start: Shape
    shape: Shape


@dataclass(frozen=True)
class Rank:
    """How many ways a parameter is split, and which part is ours."""

    size: int
    index: int


class Relation(Protocol):
    def __call__(self, hf: tuple[str, ...], shapes: tuple[Shape, ...], rank: Rank) -> Cut: ...


@dataclass(frozen=True)
class Replicated:
    """Every rank holds all of it. vLLM too: norms, routers and their biases, MLA's down
    projections (ReplicatedLinear).
    """

    def __call__(self, hf: tuple[str, ...], shapes: tuple[Shape, ...], rank: Rank) -> Cut:
        zero = (0,) * len(shapes[0])
        return shapes[0], [Piece(hf[0], zero, zero, shapes[0])]


@dataclass(frozen=True)
class Split:
    """One tensor, cut evenly along `axis`. vLLM: the same along the same axis (ColumnParallelLinear 0,
    RowParallelLinear and w2 1).
    """

    axis: int

    def __call__(self, hf: tuple[str, ...], shapes: tuple[Shape, ...], rank: Rank) -> Cut:
        shape = list(shapes[0])
        shape[self.axis] //= rank.size
        hf_start = [0] * len(shape)
        hf_start[self.axis] = rank.index * shape[self.axis]
        return tuple(shape), [Piece(hf[0], tuple(hf_start), (0,) * len(shape), tuple(shape))]


@dataclass(frozen=True)
class Stacked:
    """gate and up projections: each cut along its rows, then one above the other. vLLM: the same
    (MergedColumnParallelLinear, w13).
    """

    def __call__(self, hf: tuple[str, ...], shapes: tuple[Shape, ...], rank: Rank) -> Cut:
        (rows, columns) = shapes[0]
        rows //= rank.size
        pieces = [Piece(name, (rank.index * rows, 0), (i * rows, 0), (rows, columns)) for i, name in enumerate(hf)]
        return (len(hf) * rows, columns), pieces


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

    def __call__(self, hf: tuple[str, ...], shapes: tuple[Shape, ...], rank: Rank) -> Cut:
        rest = shapes[0][1:]
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
            for name, first, heads in zip(hf, (block * queries, group, group), (queries, 1, 1), strict=True):
                rows = heads * self.head_dim
                start = first * self.head_dim
                pieces.append(Piece(name, (start,) + (0,) * len(rest), (row,) + (0,) * len(rest), (rows, *rest)))
                row += rows
        return (row, *rest), pieces


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary, padded at its end to a multiple of the
    ranks and cut evenly; padding rows hold zeros and are in no piece.

    multiple: the vocabulary is padded to a multiple of so many rows
    first. vLLM: 64 (VocabParallelEmbedding), so its cuts lie elsewhere.
    """

    multiple: int = 1

    def __call__(self, hf: tuple[str, ...], shapes: tuple[Shape, ...], rank: Rank) -> Cut:
        vocab, columns = shapes[0]
        rows = -(-vocab // self.multiple) * self.multiple
        rows = -(-rows // rank.size)
        start = rank.index * rows
        held = max(0, min(vocab, start + rows) - start)
        return (rows, columns), [Piece(hf[0], (start, 0), (0, 0), (held, columns))] if held else []
