"""What each vLLM rank holds of every Hugging Face tensor: the weight map's own relations, cut as vLLM cuts.

A relation evaluated at vLLM's tensor-parallel size says what a vLLM rank holds: query heads with their (replicated) key
and value, rows of column-parallel and columns of row-parallel projections. Two things are vLLM's own: the vocabulary is
padded to a multiple of 64 rows (VocabParallelEmbedding), and under expert parallelism routed experts are whole, in
contiguous runs (determine_expert_map, "linear").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megarl.errors import UserError
from megarl.weights.map.relations import Piece, Rank, Relation, Shape, Vocabulary
from megarl.weights.map.weight_map import Entry, WeightMap

VOCABULARY_MULTIPLE = 64  # vllm.model_executor.layers.vocab_parallel_embedding.DEFAULT_VOCAB_PADDING_SIZE


@dataclass(frozen=True)
class RolloutLayout:
    """Rollout ranks are numbered engine by engine.

    ep: 1 cuts experts inside, over tp; else it is vLLM's --enable-expert-parallel, whose group spans tensor- and
    data-parallel ranks (vLLM's EP size is tp x dp), and an engine has ep ranks: ep must be a multiple of tp.
    """

    engines: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if self.ep > 1 and self.ep % self.tp:
            raise UserError(
                f"rollout ep {self.ep} is not a multiple of tp {self.tp}: vLLM's expert-parallel group is tp x dp ranks"
            )

    @property
    def ranks(self) -> int:
        """Ranks of one engine."""
        return max(self.tp, self.ep)

    @property
    def world(self) -> int:
        return self.engines * self.ranks


class Rect(NamedTuple):
    """hf[start : start + shape] of some Hugging Face tensor."""

    start: Shape
    shape: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Holders = tuple[Rect | None, ...]  # by rank of an engine; None holds nothing of the tensor


def rollout_rects(weight_map: WeightMap, layout: RolloutLayout) -> dict[str, Holders]:
    """Hugging Face name -> what every rank of an engine holds of it, in
    the order of hf_shapes. Alike tensors share one tuple.

    Raises UserError where vLLM could not cut a tensor so many ways.
    """
    known: dict[tuple[int, int | None], list[Holders]] = {}
    found: dict[str, Holders] = {}
    numbers = {id(entry): number for number, entry in enumerate(weight_map.entries)}
    for entry, layer in weight_map.rows():
        for expert in range(weight_map.num_experts) if entry.expert else range(1):
            owner = _expert_owner(expert, weight_map.num_experts, layout.ep) if entry.expert and layout.ep > 1 else None
            key = numbers[id(entry)], owner
            if key not in known:
                known[key] = list(_holders(entry, layout, owner))
            for name, holders in zip(entry.hf, known[key], strict=True):
                found[name.format(layer=layer, expert=expert)] = holders
    return found


def _expert_owner(expert: int, experts: int, ep: int) -> int:
    each, longer = divmod(experts, ep)  # the first `longer` ranks hold one more
    split = longer * (each + 1)
    return expert // (each + 1) if expert < split else longer + (expert - split) // each


def _holders(entry: Entry, layout: RolloutLayout, owner: int | None) -> Iterator[Holders]:
    """For each tensor of `entry`, who holds what. owner: the rank that holds a whole
    expert, under expert parallelism.
    """
    relation = _as_vllm_cuts(entry.relation)
    cuts = [
        _by_name(entry, relation, Rank(layout.tp, rank) if owner is None else Rank(1, 0)) for rank in range(layout.tp)
    ]
    for number, (name, shape) in enumerate(zip(entry.hf, entry.shapes)):
        if owner is not None:
            yield tuple(cuts[0][number] if rank == owner else None for rank in range(layout.ranks))
            continue
        rects = [cut[number] for cut in cuts]
        if _covered(rects) != math.prod(shape):
            raise UserError(
                f"rollout.tp {layout.tp} does not divide {name} of shape {list(shape)} evenly; change rollout.tp"
            )
        yield tuple(rects[rank % layout.tp] for rank in range(layout.ranks))


def _as_vllm_cuts(relation: Relation) -> Relation:
    return Vocabulary(VOCABULARY_MULTIPLE) if isinstance(relation, Vocabulary) else relation


def _by_name(entry: Entry, relation: Relation, rank: Rank) -> list[Rect | None]:
    pieces = relation(entry.hf, entry.shapes, rank)[1]
    return [_one_rect([piece for piece in pieces if piece.hf == name]) for name in entry.hf]


def _one_rect(pieces: list[Piece]) -> Rect | None:
    """Pieces that follow one another along the first axis, as one."""
    if not pieces:
        return None
    start, shape = pieces[0].hf_start, pieces[0].shape
    for piece in pieces[1:]:
        assert (
            piece.hf_start[0] == start[0] + shape[0]
            and piece.hf_start[1:] == start[1:]
            and piece.shape[1:] == shape[1:]
        ), pieces
        shape = (shape[0] + piece.shape[0], *shape[1:])
    return Rect(start, shape)


def _covered(rects: list[Rect | None]) -> int:
    """Elements held by somebody. Rectangles of different ranks are the same or apart."""
    return sum(rect.numel for rect in {rect for rect in rects if rect})
