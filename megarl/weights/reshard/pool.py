"""Replicas of the same parameters, and how they share the sending of them: the arithmetic inside
megarl/weights/reshard/plan.py.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megarl.weights.map.relations import Piece, Shape
from megarl.weights.reshard.rollout_layout import Holders, RolloutLayout


@dataclass(frozen=True)
class Transfer:
    """The source's parameter[start : start + shape] is what the destination wants as hf[hf_start : hf_start + shape].

    param: the parameter's name inside model chunk `chunk` of the source, as in the weight map's Param.
    """

    chunk: int
    param: str
    start: Shape
    hf: str
    hf_start: Shape
    shape: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Geometry:
    """What every rank of an engine wants of one piece of a parameter:
    (start in the parameter, start in the tensor, shape), or None.
    """

    overlaps: tuple[tuple[Shape, Shape, Shape] | None, ...]
    sizes: np.ndarray  # int64 [ranks of an engine]: elements
    grains: (
        np.ndarray
    )  # int64 [ranks of an engine]: elements between two places where it may be cut: a row, or all of a vector


@dataclass(frozen=True)
class Source:
    """A piece of a parameter that every member of a pool holds."""

    chunk: int
    param: str
    hf: str
    geometry: Geometry


def overlap(piece: Piece, holders: Holders) -> Geometry:
    overlaps: list[tuple[Shape, Shape, Shape] | None] = []
    for rect in holders:
        if rect is None:
            overlaps.append(None)
            continue
        low = tuple(map(max, piece.hf_start, rect.start))
        high = tuple(min(a + n, b + m) for a, n, b, m in zip(piece.hf_start, piece.shape, rect.start, rect.shape))
        shape = tuple(b - a for a, b in zip(low, high))
        local = tuple(a - b + c for a, b, c in zip(low, piece.hf_start, piece.start))
        overlaps.append((local, low, shape) if min(shape) > 0 else None)
    sizes = np.array([math.prod(o[2]) if o else 0 for o in overlaps], np.int64)
    grains = np.array([math.prod(o[2][1:] if len(o[2]) > 1 else o[2]) if o else 1 for o in overlaps], np.int64)
    return Geometry(tuple(overlaps), sizes, grains)


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

    def shares(self, bucket_of: Mapping[str, int], itemsize: Mapping[str, int]) -> Iterator[tuple[int, Share]]:
        """(bucket, what the pool owes in it), for the buckets in which it owes anything."""
        by_bucket: dict[int, list[Source]] = {}
        for source in self.sources:
            by_bucket.setdefault(bucket_of[source.hf], []).append(source)
        for bucket, sources in by_bucket.items():
            bytes_each = np.array([itemsize[source.hf] for source in sources], np.int64)
            yield bucket, Share(sources, bytes_each, len(self.members), self.rollout)


class Share:
    """One bucket's sequence of bytes: destination after destination,
    for each the sources in order; and where the members' parts end.

    Positions are bytes from the start of the sequence. As engines are
    alike, the sequence is that of one engine over and over.
    """

    def __init__(self, sources: list[Source], itemsize: np.ndarray, members: int, rollout: RolloutLayout) -> None:
        self.sources, self.rollout, self.members = sources, rollout, members
        sizes = (
            np.stack([source.geometry.sizes for source in sources], axis=1) * itemsize
        )  # [ranks of an engine, sources]
        self.ends = np.zeros((rollout.ranks, len(sources) + 1), np.int64)
        np.cumsum(sizes, axis=1, out=self.ends[:, 1:])
        self.starts = np.concatenate(
            [[0], np.cumsum(self.ends[:, -1])]
        )  # of each rank of an engine; last, the size of an engine
        self._itemsize = itemsize

    @property
    def engine_bytes(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def cuts(self) -> np.ndarray:
        """int64 [members + 1]: member k sends positions cuts[k] to cuts[k + 1]. Equal
        parts, moved to the nearest row.
        """
        total = self.engine_bytes * self.rollout.engines
        ideal = total * np.arange(self.members + 1) // self.members
        if not total:
            return ideal
        engine, inside = np.divmod(ideal, self.engine_bytes)
        at = np.concatenate(
            [[0], (self.starts[:-1, None] + self.ends[:, 1:]).ravel()]
        )  # where each (rank, source) starts
        grains = np.stack([source.geometry.grains for source in self.sources], axis=1) * self._itemsize
        entry = np.minimum(np.searchsorted(at, inside, "right") - 1, grains.size - 1)
        grain = grains.ravel()[entry]
        rounded = (inside - at[entry] + grain // 2) // grain * grain
        return engine * self.engine_bytes + at[entry] + rounded

    def part_of(self, member: int) -> Iterator[tuple[int, int, int]]:
        """(destination, from, to): what `member` sends; from and to are bytes of the destination's own sequence."""
        position, end = int(self.cuts[member]), int(self.cuts[member + 1])
        while position < end:
            engine, inside = divmod(position, self.engine_bytes)
            rank = int(np.searchsorted(self.starts, inside, "right")) - 1
            start = engine * self.engine_bytes + int(self.starts[rank])
            stop = min(end, engine * self.engine_bytes + int(self.starts[rank + 1]))
            yield engine * self.rollout.ranks + rank, position - start, stop - start
            position = stop

    def parts_for(self, destination: int) -> Iterator[tuple[int, int, int]]:
        """(member, from, to): who sends what `destination` wants; as in part_of."""
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
                yield member, low - start, high - start

    def pair_bytes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Three arrays that run in parallel: member, destination, bytes; every pair once."""
        borders = (np.arange(self.rollout.engines)[:, None] * self.engine_bytes + self.starts[:-1]).ravel()
        positions = np.unique(np.concatenate([borders, self.cuts]))
        low, nbytes = positions[:-1], np.diff(positions)
        member = np.searchsorted(self.cuts, low, "right") - 1
        destination = np.searchsorted(borders, low, "right") - 1
        return member, destination, nbytes

    def transfers(self, rank: int, low: int, high: int) -> Iterator[Transfer]:
        """The rectangles in bytes low to high of what a rank of an engine wants, whole rows of them."""
        ends = self._lists[rank]
        number = bisect_right(ends, low) - 1
        while number < len(self.sources) and ends[number] < high:
            source = self.sources[number]
            found = source.geometry.overlaps[rank]
            if found is not None:
                local, hf, shape = found
                row = int(self._itemsize[number]) * math.prod(shape[1:])
                first = max(low - ends[number], 0) // row
                rows = (min(high, ends[number + 1]) - ends[number]) // row - first
                start, hf_start = (local[0] + first, *local[1:]), (hf[0] + first, *hf[1:])
                yield Transfer(source.chunk, source.param, start, source.hf, hf_start, (rows, *shape[1:]))
            number += 1

    @cached_property
    def _lists(self) -> list[list[int]]:
        return self.ends.tolist()
