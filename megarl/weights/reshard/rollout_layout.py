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

from megarl.errors import UserError
from megarl.weights.map.relations import Piece, Rank, Relation, Vocabulary
from megarl.weights.map.weight_map import Entry, WeightMap
from megarl.weights.rect import Rect

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


Holders = tuple[Rect | None, ...]  # by rank of an engine; None holds nothing of the tensor


def rollout_rects(weight_map: WeightMap, layout: RolloutLayout) -> dict[str, Holders]:
    """Hugging Face name -> what every rank of an engine holds of it, in
    the order of hf_shapes. Alike tensors share one tuple.

    Raises UserError where vLLM could not cut a tensor so many ways.
    """
    known: dict[tuple[int, int | None], list[Holders]] = {}
    rects: dict[str, Holders] = {}
    numbers = {id(entry): number for number, entry in enumerate(weight_map.entries)}
    for entry, layer in weight_map.rows():
        for expert in range(weight_map.num_experts) if entry.expert else range(1):
            owner = _expert_owner(expert, weight_map.num_experts, layout.ep) if entry.expert and layout.ep > 1 else None
            key = numbers[id(entry)], owner
            if key not in known:
                known[key] = list(_holders(entry, layout, owner))
            for name, holders in zip(entry.hf_names, known[key], strict=True):
                rects[name.format(layer=layer, expert=expert)] = holders
    return rects


def _expert_owner(expert: int, experts: int, ep: int) -> int:
    each, longer = divmod(experts, ep)  # the first `longer` ranks hold one more
    split = longer * (each + 1)
    return expert // (each + 1) if expert < split else longer + (expert - split) // each


def _holders(entry: Entry, layout: RolloutLayout, owner: int | None) -> Iterator[Holders]:
    """For each tensor of `entry`, who holds what. owner: the rank that holds a whole
    expert, under expert parallelism.
    """
    if owner is not None:
        for shape in entry.hf_shapes:
            yield tuple(Rect.whole(shape) if rank == owner else None for rank in range(layout.ranks))
        return
    relation = _as_vllm_cuts(entry.relation)
    shards = [relation(entry.hf_names, entry.hf_shapes, Rank(layout.tp, rank)) for rank in range(layout.tp)]
    for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True):
        rects = [_one_rect([piece for piece in shard.pieces if piece.hf_name == name]) for shard in shards]
        if sum(rect.numel for rect in set(rects) if rect) != math.prod(shape):  # ranks hold the same, or apart
            raise UserError(
                f"rollout.tp {layout.tp} does not divide {name} of shape {list(shape)} evenly; change rollout.tp"
            )
        yield tuple(rects[rank % layout.tp] for rank in range(layout.ranks))


def _as_vllm_cuts(relation: Relation) -> Relation:
    return Vocabulary(VOCABULARY_MULTIPLE) if isinstance(relation, Vocabulary) else relation


def _one_rect(pieces: list[Piece]) -> Rect | None:
    """Pieces that follow one another along the first axis, as one."""
    if not pieces:
        return None
    rect = pieces[0].rect
    for piece in pieces[1:]:
        assert piece.rect == Rect((rect.end[0], *rect.offset[1:]), (piece.rect.size[0], *rect.size[1:])), pieces
        rect = rect.rows(0, rect.size[0] + piece.rect.size[0])
    return rect
