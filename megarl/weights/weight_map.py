"""One weight map: for every Megatron parameter, which Hugging Face tensors it holds and how the two lie in each other.

Every relation comes down to rectangles: a slice of a Hugging Face tensor that equals a slice of this rank's parameter (`Piece`).
Loading, gathering and verifying all read the same list of rectangles, so there is no second source of truth.
A family is a table of `Entry` (megarl/weights/families/); the sizes come from the Hugging Face config.json.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megarl.errors import UserError
from megarl.weights.layout import Coord, Layout

FAMILIES = {"qwen3_moe": "megarl.weights.families.qwen3_moe"}  # model_type of config.json -> module

Split = Literal["none", "tp", "etp"]


@dataclass(frozen=True)
class Piece:
    """A rectangle: hf[hf_start : hf_start + shape] equals local[start : start + shape] on every axis."""

    hf: str
    hf_start: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Param:
    """A parameter of one rank: its name inside its model chunk, its local shape and what it holds.

    replica is 0 on exactly one rank for each distinct content: that rank is the one that sends it.
    """

    chunk: int
    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    replica: int
    expert: bool
    split: bool  # cut over tensor-parallel ranks (if there are several)


@dataclass(frozen=True)
class Entry:
    """A row of a family's table. `hf` holds {layer} and {expert} where they occur; `relation` cuts it into pieces."""

    name: str
    hf: tuple[str, ...]
    relation: Relation
    where: Literal["layer", "first", "last"] = "layer"


@dataclass(frozen=True)
class Rank:
    """How many ways a parameter is split, and which part is ours."""

    size: int
    index: int


Relation = Callable[[tuple[str, ...], tuple[tuple[int, ...], ...], Rank], tuple[tuple[int, ...], list[Piece]]]


def replicated(hf: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], rank: Rank) -> tuple[tuple[int, ...], list[Piece]]:
    zero = (0,) * len(shapes[0])
    return shapes[0], [Piece(hf[0], zero, zero, shapes[0])]


def split(axis: int) -> Relation:
    """One Hugging Face tensor, cut evenly along `axis`."""

    def relation(hf: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], rank: Rank) -> tuple[tuple[int, ...], list[Piece]]:
        shape = list(shapes[0])
        shape[axis] //= rank.size
        hf_start = [0] * len(shape)
        hf_start[axis] = rank.index * shape[axis]
        return tuple(shape), [Piece(hf[0], tuple(hf_start), (0,) * len(shape), tuple(shape))]

    return relation


def stacked(hf: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], rank: Rank) -> tuple[tuple[int, ...], list[Piece]]:
    """gate and up projections: each cut along its rows, then one above the other."""
    (rows, columns) = shapes[0]
    rows //= rank.size
    pieces = [Piece(name, (rank.index * rows, 0), (i * rows, 0), (rows, columns)) for i, name in enumerate(hf)]
    return (len(hf) * rows, columns), pieces


def grouped_qkv(groups: int, queries: int, head_dim: int) -> Relation:
    """Query heads of a group, its key, its value; group after group (megatron-core's order). `queries` are heads a group."""

    def relation(hf: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], rank: Rank) -> tuple[tuple[int, ...], list[Piece]]:
        rest = shapes[0][1:]
        pieces: list[Piece] = []
        row = 0
        for group in range(rank.index * groups // rank.size, (rank.index + 1) * groups // rank.size):
            for name, heads in zip(hf, (queries, 1, 1), strict=True):
                rows = heads * head_dim
                pieces.append(Piece(name, (group * rows,) + (0,) * len(rest), (row,) + (0,) * len(rest), (rows, *rest)))
                row += rows
        return (row, *rest), pieces

    return relation


def vocabulary(padded: int) -> Relation:
    """Rows of the vocabulary, padded at its end to `padded` rows and cut evenly; padding rows hold zeros and belong to no piece."""

    def relation(hf: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], rank: Rank) -> tuple[tuple[int, ...], list[Piece]]:
        vocab, columns = shapes[0]
        rows = padded // rank.size
        start = rank.index * rows
        held = max(0, min(vocab, start + rows) - start)
        return (rows, columns), [Piece(hf[0], (start, 0), (0, 0), (held, columns))] if held else []

    return relation


class WeightMap:
    """The map of one model: a family's table with the sizes of one config.json filled in.

    hf_shapes: shape of every Hugging Face tensor. model: keyword arguments of Megatron's TransformerConfig that the architecture
    decides. gpt: those of its GPTModel.
    """

    def __init__(self, hf: dict[str, Any]) -> None:
        model_type = hf.get("model_type", "?")
        if model_type not in FAMILIES:
            raise UserError(f"model_type {model_type!r} has no weight map; supported: {', '.join(sorted(FAMILIES))}")
        family = importlib.import_module(FAMILIES[model_type])
        self.hf = hf
        self.num_layers: int = hf["num_hidden_layers"]
        self.num_experts: int = family.num_experts(hf)
        self.moe_layers: list[int] = family.moe_layers(hf)
        self.top_k: int = family.top_k(hf)
        self.model: dict[str, Any] = family.transformer_config(hf)
        self.gpt: dict[str, Any] = family.gpt_model(hf)
        self.hf_shapes: dict[str, tuple[int, ...]] = dict(family.hf_shapes(hf))
        self._table = family.table

    def padded_vocab(self, tp: int) -> int:
        return -(-self.hf["vocab_size"] // tp) * tp

    def params(self, layout: Layout, coord: Coord) -> Iterator[Param]:
        """Every parameter that the rank at `coord` holds, in a fixed order."""
        table: list[Entry] = self._table(self.hf, self.padded_vocab(layout.tp))
        for chunk in range(layout.vpp):
            for entry in table:
                if entry.where == "first" and (coord.pp or chunk):
                    continue
                if entry.where == "last" and (coord.pp, chunk) != (layout.pp - 1, layout.vpp - 1):
                    continue
                layers = layout.stage_layers(self.num_layers, coord.pp, chunk) if entry.where == "layer" else range(1)
                for local, layer in enumerate(layers):
                    yield from self._layer(entry, layout, coord, chunk, local, layer)

    def _layer(self, entry: Entry, layout: Layout, coord: Coord, chunk: int, local: int, layer: int) -> Iterator[Param]:
        expert = "{expert}" in entry.name
        each = self.num_experts // layout.ep if expert else 1
        rank = Rank(layout.etp, coord.etp) if expert else Rank(layout.tp, coord.tp)
        for e in range(each):
            hf = tuple(name.format(layer=layer, expert=coord.ep * each + e) for name in entry.hf)
            if hf[0] not in self.hf_shapes:  # a dense layer in a MoE model has no experts, and the other way round
                continue
            shape, pieces = entry.relation(hf, tuple(self.hf_shapes[name] for name in hf), rank)
            copies = [coord.edp] if expert else [coord.dp, coord.cp]
            if entry.relation is replicated:
                copies.append(rank.index)
            name = entry.name.format(layer=local, expert=e)
            yield Param(chunk, name, shape, tuple(pieces), replica=sum(copies), expert=expert, split=entry.relation is not replicated)


def load_hf_config(path: str | Path) -> dict[str, Any]:
    file = Path(path) / "config.json"
    if not file.is_file():
        raise UserError(f"model.path {str(path)!r} has no config.json; give a Hugging Face checkpoint folder")
    return json.loads(file.read_text())
