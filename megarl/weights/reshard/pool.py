"""Replicas of the same parameters, and how they share the sending of them: the arithmetic inside
megarl/weights/reshard/plan.py.

Shapes: R ranks of an engine, E engines, S sources in a share, M members of a pool.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megarl.weights.map.relations import Piece
from megarl.weights.rect import Rect, Shape
from megarl.weights.reshard.message import Transfer
from megarl.weights.reshard.rollout_layout import Holders, RolloutLayout


@dataclass(frozen=True)
class Overlap:
    """What every rank of an engine wants of one piece of a parameter."""

    rects: tuple[Rect | None, ...]  # R, of the Hugging Face tensor
    shift: Shape  # tensor[index] is parameter[index + shift]
    sizes: np.ndarray  # int64 [R]: elements
    grains: np.ndarray  # int64 [R]: elements between two places where it may be cut: a row, or all of a vector


def overlap(piece: Piece, holders: Holders) -> Overlap:
    rects = tuple(rect and piece.rect.intersect(rect) for rect in holders)
    sizes = np.array([rect.numel if rect else 0 for rect in rects], np.int64)
    grains = np.array([math.prod(rect.size[1:] or rect.size) if rect else 1 for rect in rects], np.int64)
    return Overlap(rects, piece.local.within(piece.rect).offset, sizes, grains)


@dataclass(frozen=True)
class Source:
    """A piece of a parameter that every member of a pool holds."""

    chunk: int
    param: str
    hf_name: str
    overlap: Overlap


class Span(NamedTuple):
    """Bytes low to high of what a rollout rank wants of a share. rank: the one at the other end, a member (its number
    in the pool) or a destination.
    """

    rank: int
    low: int
    high: int


class Pairs(NamedTuple):
    """Who sends how much to whom: three int64 arrays that run in parallel, every pair once."""

    member: np.ndarray
    destination: np.ndarray
    nbytes: np.ndarray


@dataclass(frozen=True)
class Pool:
    """Trainer ranks of one stage that hold the same pieces."""

    stage: int
    members: tuple[int, ...]
    rollout: RolloutLayout
    sources: list[Source]

    @cached_property
    def ranks(self) -> np.ndarray:
        return np.array(self.members, np.int64)

    def shares(self, bucket_of: Mapping[str, int], itemsize: Mapping[str, int]) -> dict[int, Share]:
        """Bucket -> what the pool owes in it, for the buckets in which it owes anything."""
        by_bucket: dict[int, list[Source]] = {}
        for source in self.sources:
            by_bucket.setdefault(bucket_of[source.hf_name], []).append(source)
        return {
            bucket: Share(
                sources,
                np.array([itemsize[source.hf_name] for source in sources], np.int64),
                len(self.members),
                self.rollout,
            )
            for bucket, sources in by_bucket.items()
        }


class Share:
    """One bucket's sequence of bytes: destination after destination,
    for each the sources in order; and where the members' parts end.

    Positions are bytes from the start of the sequence. As engines are
    alike, the sequence is that of one engine over and over.
    """

    def __init__(self, sources: list[Source], itemsize: np.ndarray, members: int, rollout: RolloutLayout) -> None:
        """itemsize: int64 [S]."""
        self.sources, self.rollout, self.members = sources, rollout, members
        sizes = np.stack([source.overlap.sizes for source in sources], axis=1) * itemsize  # [R, S]
        self.ends = np.zeros((rollout.ranks, len(sources) + 1), np.int64)  # [R, S + 1], from the rank's start
        np.cumsum(sizes, axis=1, out=self.ends[:, 1:])
        self.starts = np.concatenate([[0], np.cumsum(self.ends[:, -1])])  # [R + 1]; last, the size of an engine
        self._itemsize = itemsize

    @property
    def engine_bytes(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def cuts(self) -> np.ndarray:
        """int64 [M + 1]: member k sends positions cuts[k] to cuts[k + 1]. Equal parts, moved to the nearest row."""
        total = self.engine_bytes * self.rollout.engines
        ideal = total * np.arange(self.members + 1) // self.members
        if not total:
            return ideal
        engine, inside = np.divmod(ideal, self.engine_bytes)
        starts = np.concatenate([[0], (self.starts[:-1, None] + self.ends[:, 1:]).ravel()])  # [R * S + 1]
        grains = np.stack([source.overlap.grains for source in self.sources], axis=1) * self._itemsize  # [R, S]
        entry = np.minimum(np.searchsorted(starts, inside, "right") - 1, grains.size - 1)
        grain = grains.ravel()[entry]
        rounded = (inside - starts[entry] + grain // 2) // grain * grain
        return engine * self.engine_bytes + starts[entry] + rounded

    def part_of(self, member: int) -> Iterator[Span]:
        """What `member` sends, by destination."""
        position, end = int(self.cuts[member]), int(self.cuts[member + 1])
        while position < end:
            engine, inside = divmod(position, self.engine_bytes)
            rank = int(np.searchsorted(self.starts, inside, "right")) - 1
            start = engine * self.engine_bytes + int(self.starts[rank])
            stop = min(end, engine * self.engine_bytes + int(self.starts[rank + 1]))
            yield Span(engine * self.rollout.ranks + rank, position - start, stop - start)
            position = stop

    def parts_for(self, destination: int) -> Iterator[Span]:
        """What `destination` receives, by member."""
        engine, rank = divmod(destination, self.rollout.ranks)
        start = engine * self.engine_bytes + int(self.starts[rank])
        stop = engine * self.engine_bytes + int(self.starts[rank + 1])
        if start == stop:
            return
        first = int(np.searchsorted(self.cuts, start, "right")) - 1
        for member in range(first, self.members):
            low, high = max(start, int(self.cuts[member])), min(stop, int(self.cuts[member + 1]))
            if low >= stop:
                return
            if low < high:
                yield Span(member, low - start, high - start)

    def pair_bytes(self) -> Pairs:
        borders = (np.arange(self.rollout.engines)[:, None] * self.engine_bytes + self.starts[:-1]).ravel()  # [E * R]
        positions = np.unique(np.concatenate([borders, self.cuts]))
        low = positions[:-1]
        member = np.searchsorted(self.cuts, low, "right") - 1
        destination = np.searchsorted(borders, low, "right") - 1
        return Pairs(member, destination, np.diff(positions))

    def transfers(self, rank: int, span: Span) -> Iterator[Transfer]:
        """The rectangles in a span of what a rank of an engine wants, whole rows of them."""
        ends = self._lists[rank]
        number = bisect_right(ends, span.low) - 1
        while number < len(self.sources) and ends[number] < span.high:
            source = self.sources[number]
            wanted = source.overlap.rects[rank]
            if wanted is not None:
                row = int(self._itemsize[number]) * math.prod(wanted.size[1:])
                first = max(span.low - ends[number], 0) // row
                count = (min(span.high, ends[number + 1]) - ends[number]) // row - first
                rect = wanted.rows(first, count)
                offset = rect.moved(source.overlap.shift).offset
                yield Transfer(source.hf_name, rect, offset, source.chunk, source.param)
            number += 1

    @cached_property
    def _lists(self) -> list[list[int]]:
        return self.ends.tolist()
