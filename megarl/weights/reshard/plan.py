"""The plan of a resharded weight sync: which trainer rank sends which rectangle of which tensor to which rollout rank.
Pure.

    plan = make_plan(train_layout, rollout_layout, weight_map, itemsize=2)
    for message in plan.sends(rank): ...     # trainer rank: what it packs and sends, bucket by bucket
    for message in plan.receives(rank): ...  # rollout rank, numbered engine by engine from 0: what comes in
    plan.shards(rank)                        # rollout rank: what it holds in the end

There is at most one message for each (source, destination, bucket); its slices are packed one after
the other in their order, each row-major, and both ends compute the same order. All of a tensor lies in
one bucket. The messages that a rollout rank receives in one bucket hold at most `bucket_bytes`
together, or one larger tensor. A bucket takes tensors from every pipeline stage and every group of
experts, in proportion, so that all trainer ranks send, and all rollout ranks receive, all the time.

Ranks that hold the same parameters (data-parallel and context-parallel replicas; for experts expert-data-parallel ones;
for replicated parameters the tensor-parallel ranks too) make up a `Pool`. What a pool owes in a bucket is one sequence,
destination after destination; its members take equal consecutive parts of it, cut at rows of a matrix. So the load
within a pool is even in every bucket, each sender has few destinations, and any rank computes its own part by a search
in running sums (megarl/weights/reshard/pool.py).

Shapes: W trainer ranks, V rollout ranks, R ranks of an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megarl.weights.buckets import IN_FLIGHT, fill_buckets
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import Param, WeightMap
from megarl.weights.rect import Rect
from megarl.weights.reshard.message import Message, Transfer
from megarl.weights.reshard.pool import Overlap, Pool, Share, Source, overlap
from megarl.weights.reshard.rollout_layout import Holders, RolloutLayout, rollout_rects

# Of a bucket into one rollout rank. On a small model so small that packing, the wire and checking overlap; on a large
# one so large that it has tensors of most senders: where few of them send at a time, all wait for these.
LEAST_BUCKET, MOST_BUCKET = 16 * 2**20, 256 * 2**20
BUCKETS = 128  # of a model between the two; more where a trainer rank packs for several rollout ranks at a time


@dataclass(frozen=True)
class Load:
    """Bytes by rank over a whole sync, and how many messages carry them."""

    sent: np.ndarray  # int64 [W]
    received: np.ndarray  # int64 [V]
    messages: int
    pairs: np.ndarray  # int64 [W, V]: bytes from one to the other
    lockstep: int  # bytes of the busiest sender of each bucket, summed: what counts if buckets followed in step


def make_plan(
    train: Layout, rollout: RolloutLayout, weight_map: WeightMap, *, itemsize: int = 2, bucket_bytes: int | None = None
) -> Plan:
    """itemsize: bytes of an element on the wire (rollout.dtype); tensors in weight_map.hf_float32 take 4. bucket_bytes:
    None is what the model's size asks for.

    Raises UserError where vLLM cannot cut the model so, RuntimeError
    where the trainers do not hold exactly what the rollout ranks want.
    """
    return Plan(train, rollout, weight_map, itemsize, bucket_bytes)


class Plan:
    """See the module. `buckets` is their number. Nothing is listed before a rank asks for its own."""

    def __init__(
        self, train: Layout, rollout: RolloutLayout, weight_map: WeightMap, itemsize: int, bucket_bytes: int | None
    ) -> None:
        self.train, self.rollout = train, rollout
        self.rects = rollout_rects(weight_map, rollout)
        self._itemsize = {name: 4 if name in weight_map.hf_float32 else itemsize for name in self.rects}
        self._pools = _pools(train, rollout, weight_map, self.rects)
        self._check_coverage()
        buckets = BUCKETS * -(-rollout.world // train.world)
        fitting = min(max(int(self.held_bytes().max()) // buckets, LEAST_BUCKET), MOST_BUCKET)
        self.bucket_of = self._fill_buckets(bucket_bytes or fitting)  # Hugging Face name -> bucket
        self.buckets = 1 + max(self.bucket_of.values())
        self._shares: list[list[tuple[Pool, Share]]] = [[] for _ in range(self.buckets)]
        for pool in self._pools:
            for bucket, share in pool.shares(self.bucket_of, self._itemsize).items():
                self._shares[bucket].append((pool, share))

    def sends(self, rank: int) -> Iterator[Message[Transfer]]:
        """Of trainer rank `rank`, in the order of the buckets; within one
        it starts at a destination of its own, lest all crowd at one.
        """
        member = {id(pool): pool.members.index(rank) for pool in self._pools if rank in pool.members}
        for bucket, shares in enumerate(self._shares):
            transfers: dict[int, list[Transfer]] = {}  # by destination
            for pool, share in shares:
                if id(pool) in member:
                    for span in share.part_of(member[id(pool)]):
                        transfers.setdefault(span.rank, []).extend(
                            share.transfers(span.rank % self.rollout.ranks, span)
                        )
            order = sorted(transfers)
            turn = rank % len(order) if order else 0
            for destination in order[turn:] + order[:turn]:
                yield Message(bucket, rank, destination, tuple(transfers[destination]))

    def receives(self, rank: int) -> Iterator[Message[Transfer]]:
        """Of rollout rank `rank`, in the order of the buckets; within one, of the sources."""
        for bucket, shares in enumerate(self._shares):
            transfers: dict[int, list[Transfer]] = {}  # by source
            for pool, share in shares:
                for span in share.parts_for(rank):
                    transfers.setdefault(pool.members[span.rank], []).extend(
                        share.transfers(rank % self.rollout.ranks, span)
                    )
            for source in sorted(transfers):
                yield Message(bucket, source, rank, tuple(transfers[source]))

    def shards(self, rank: int) -> dict[str, Rect]:
        """What rollout rank `rank` holds of each tensor, in the order of hf_shapes; those of which it holds nothing
        are left out.
        """
        return {name: rect for name, holders in self.rects.items() if (rect := holders[rank % self.rollout.ranks])}

    @cached_property
    def load(self) -> Load:
        """The figures of the whole plan, without listing its transfers."""
        pairs = np.zeros((self.train.world, self.rollout.world), np.int64)
        messages = lockstep = 0
        for place, moved in self._messages():
            messages += place.size
            pairs.ravel()[place] += moved
            lockstep += int(np.bincount(place // self.rollout.world, moved).max())
        return Load(pairs.sum(1), pairs.sum(0), messages, pairs, lockstep)

    def kept_bytes(self) -> np.ndarray:
        """Of the messages that each trainer rank keeps from sync to sync (outgoing.py), without padding and checksums:
        for each destination the largest of every IN_FLIGHT-th bucket in which the rank sends. int64 [W].
        """
        largest = np.zeros((IN_FLIGHT, self.train.world, self.rollout.world), np.int64)
        sent = np.zeros(self.train.world, np.int64)  # buckets so far
        for place, moved in self._messages():
            source, destination = np.divmod(place, self.rollout.world)
            key = sent[source] % IN_FLIGHT, source, destination
            largest[key] = np.maximum(largest[key], moved)
            sent[np.unique(source)] += 1
        return largest.sum((0, 2))

    def _messages(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Bucket by bucket, of every message: source * V + destination, and its bytes. int64 [messages] each."""
        for shares in self._shares:
            places, nbytes = [], []
            for pool, share in shares:
                pairs = share.pair_bytes()
                places.append(pool.ranks[pairs.member] * self.rollout.world + pairs.destination)
                nbytes.append(pairs.nbytes)
            place, owner = np.unique(np.concatenate(places), return_inverse=True)
            yield place, np.bincount(owner, np.concatenate(nbytes)).astype(np.int64)

    def held_bytes(self) -> np.ndarray:
        """Bytes that each rollout rank holds: int64 [V]."""
        engine = np.zeros(self.rollout.ranks, np.int64)
        for name, holders in self.rects.items():
            engine += self._sizes(holders) * self._itemsize[name]
        return np.tile(engine, self.rollout.engines)

    def least_sent(self) -> int:
        """Bytes that some trainer rank must send where all go straight to the rollout ranks that keep them: what the
        fullest stage owes, over the stage's ranks. No bound for schemes in which rollout ranks pass on what they got.
        """
        by_stage = self.load.sent.reshape(self.train.pp, -1).sum(1)
        return -(-int(by_stage.max()) // (self.train.world // self.train.pp))

    def _sizes(self, holders: Holders) -> np.ndarray:
        """Elements by rank of an engine: int64 [R]."""
        key = id(holders)
        if key not in self._known_sizes:
            self._known_sizes[key] = np.array([rect.numel if rect else 0 for rect in holders], np.int64)
        return self._known_sizes[key]

    @cached_property
    def _known_sizes(self) -> dict[int, np.ndarray]:
        return {}

    def _check_coverage(self) -> None:
        sent: dict[str, np.ndarray] = {}
        for pool in self._pools:
            for source in pool.sources:
                sent[source.hf_name] = sent.get(source.hf_name, 0) + source.overlap.sizes
        for name, holders in self.rects.items():
            if name not in sent or not np.array_equal(sent[name], self._sizes(holders)):
                raise RuntimeError(
                    f"layout {self.train} does not hold every element of {name} once in each set of replicas"
                )

    def _fill_buckets(self, limit: int) -> dict[str, int]:
        """Tensor -> bucket. Tensors of the same senders and the same
        receivers keep their order; these streams take turns in proportion.
        """
        sizes = {name: self._sizes(holders) * self._itemsize[name] for name, holders in self.rects.items()}
        senders: dict[str, tuple[int, ...]] = {}
        for number, pool in enumerate(self._pools):
            for source in pool.sources:
                senders[source.hf_name] = (*senders.get(source.hf_name, ()), number)
        total: dict[tuple[object, ...], int] = {}
        middle: dict[str, int] = {}
        stream = {name: (senders[name], (size > 0).tobytes()) for name, size in sizes.items()}
        for name, size in sizes.items():
            before, nbytes = total.get(stream[name], 0), int(size.sum())
            middle[name] = before + nbytes // 2
            total[stream[name]] = before + nbytes
        order = sorted(sizes, key=lambda name: middle[name] / max(total[stream[name]], 1))
        buckets = fill_buckets(((name, sizes[name]) for name in order), limit)
        return {name: number for number, names in enumerate(buckets) for name in names}


def _pools(train: Layout, rollout: RolloutLayout, weight_map: WeightMap, rects: dict[str, Holders]) -> list[Pool]:
    """Every set of replicas, with the rectangles of Hugging Face tensors that each of its members holds."""
    members: dict[tuple[int, ...], list[int]] = {}
    coords = [train.coord(rank) for rank in range(train.world)]
    for coord in coords:
        dense, expert = (coord.pp, 0), (coord.pp, 1, coord.ep)
        keys: tuple[tuple[int, ...], ...] = (dense, (*dense, coord.tp), expert, (*expert, coord.etp))
        for key in keys:
            members.setdefault(key, []).append(coord.rank)
    order = {name: number for number, name in enumerate(rects)}
    overlaps: dict[tuple[object, ...], Overlap] = {}
    pools: list[Pool] = []
    for rank in sorted({ranks[0] for ranks in members.values()}):
        coord = coords[rank]
        sources: dict[tuple[int, ...], list[Source]] = {}
        for param in weight_map.params(train, coord):
            place: tuple[int, ...] = (coord.ep, coord.etp) if param.expert else (coord.tp,)
            key = (coord.pp, int(param.expert), *place[: len(place) - (not param.split)])
            if members[key][0] == rank:
                sources.setdefault(key, []).extend(_sources(param, rects, overlaps))
        for key, of_pool in sources.items():
            of_pool.sort(key=lambda source: order[source.hf_name])
            pools.append(Pool(coord.pp, tuple(members[key]), rollout, of_pool))
    return pools


def _sources(param: Param, rects: dict[str, Holders], overlaps: dict[tuple[object, ...], Overlap]) -> Iterator[Source]:
    """overlaps: those computed so far; pieces that lie alike share one."""
    for piece in param.pieces:
        holders = rects[piece.hf_name]
        key = (id(holders), piece.rect, piece.offset)
        if key not in overlaps:
            overlaps[key] = overlap(piece, holders)
        yield Source(param.chunk, param.name, piece.hf_name, overlaps[key])
