"""From the ranks that fetched the responses to the ranks that train
them: every tensor moves once, straight to its owner.

Each rank of a data-parallel replica needs the tokens and rollout log-probabilities of its
replica's responses, and of the routes only the rows of its own sequence-parallel slice and
the layers of its own stage. Every rank knows the whole assignment, so both sides compute the
same byte layout and nothing but payload travels: one message from each owner to each rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.engine.batch import Meta, Pack, make_pack, pack_lengths, router_rows, scatter_rows
from megarl.engine.parallel import Parallel
from megarl.errors import Stopped, UserError
from megarl.replay.routes import route_dtype, spread_routes
from megarl.rollout.response import Response
from megarl.weights.map.layout import Coord, Layout


@dataclass(frozen=True)
class RouteShape:
    """Routes of this model: MoE layers and experts in all, top-k, and the MoE layers that each stage holds."""

    layers_of_stage: tuple[tuple[int, ...], ...]
    num_experts: int
    top_k: int

    @property
    def dtype(self) -> np.dtype:
        return route_dtype(self.num_experts)


@dataclass(frozen=True)
class _Share:
    """Rows [first, last) of one response, whose routes one rank needs,
    and where they lie in that rank's slice of the pack.
    """

    response: int
    pack: int
    first: int
    last: int
    row: int


class _Placed(NamedTuple):
    """A pack of a replica: its number, its responses, its padded length."""

    number: int
    members: list[int]
    length: int


@dataclass(frozen=True)
class LossInputs:
    """What the loss takes of each response, the same on all its tokens: tensors [responses of the batch].

    masked: bool; a response whose tokens are not learnt from.
    """

    rewards: Tensor
    advantages: Tensor
    denominators: Tensor
    masked: Tensor


@dataclass(frozen=True)
class Exchanged:
    """packs: this rank's, filled. route_bytes: of the routes it received."""

    packs: list[Pack]
    route_bytes: int


def exchange(
    assignment: list[list[list[int]]],
    metas: Sequence[Meta],
    loss_inputs: LossInputs,
    responses: dict[int, Response],
    parallel: Parallel,
    route_shape: RouteShape | None,
) -> Exchanged:
    """Moves every response to the ranks that train it. Collective.

    assignment: packs[replica][pack] -> indices into metas. responses: those this rank fetched, by the same index.
    route_shape: None if no routes travel.
    """
    layout, me = parallel.layout, parallel.coord
    local_packs = assignment[me.dp]
    shares = _shares(_placed(local_packs, metas, layout), metas, layout, me) if route_shape else []
    outgoing = _outgoing(assignment, metas, responses, layout, route_shape) if responses else {}
    sizes = dict.fromkeys(sorted({meta.owner for meta in metas}), 0)
    for i in (i for pack in local_packs for i in pack):
        sizes[metas[i].owner] += 4 * metas[i].tokens + 4 * (metas[i].tokens - metas[i].prompt_len)
    for share in shares:
        sizes[metas[share.response].owner] += _route_bytes(share, metas[share.response], me, route_shape)
    incoming = _swap(outgoing, sizes, parallel)
    exchanged = _fill(local_packs, shares, metas, incoming, parallel, route_shape)
    for pack in exchanged.packs:
        members, rollout, n = torch.tensor(pack.responses, dtype=torch.long), pack.rollout, pack.rows
        groups = torch.tensor([metas[i].group for i in pack.responses], dtype=torch.long)
        place = pack.seq_ids[:n]
        response = members[place]
        rollout.rewards[:n] = loss_inputs.rewards[response].float()
        rollout.advantages[:n] = loss_inputs.advantages[response].float()
        rollout.denominators[:n] = loss_inputs.denominators[response].float()
        rollout.group_ids[:n] = groups[place]
        pack.mask[:n][loss_inputs.masked[response]] = 0
    return exchanged


def _lengths(packs: list[list[int]], metas: Sequence[Meta], layout: Layout) -> list[int]:
    return pack_lengths([sum(metas[i].rows for i in members) for members in packs], layout)


def _placed(
    packs: list[list[int]], metas: Sequence[Meta], layout: Layout, wanted: Collection[int] | None = None
) -> list[_Placed]:
    """wanted: only the packs that hold one of these responses."""
    return [
        _Placed(number, members, length)
        for number, (members, length) in enumerate(zip(packs, _lengths(packs, metas, layout), strict=True))
        if wanted is None or any(i in wanted for i in members)
    ]


def _shares(
    placed: list[_Placed],
    metas: Sequence[Meta],
    layout: Layout,
    coord: Coord,
    wanted: Collection[int] | None = None,
) -> list[_Share]:
    """What the routers of the rank at `coord` see, as runs of consecutive rows of one response. wanted: of
    these alone.
    """
    shares = []
    for number, members, length in placed:
        edges = np.cumsum([0] + [metas[i].rows for i in members])
        rows = router_rows(length, layout, coord).numpy()
        rows = rows[rows < edges[-1]]
        owner = np.searchsorted(edges, rows, side="right") - 1
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(owner) != 0)) + 1
        runs = np.concatenate([[0], breaks])[: len(rows)]
        lengths = np.diff(runs, append=len(rows))
        places = owner[runs]
        starts = rows[runs] - edges[places]
        for place, start, count, row in zip(*map(np.ndarray.tolist, (places, starts, lengths, runs)), strict=True):
            if wanted is None or members[place] in wanted:
                shares.append(_Share(members[place], number, start, start + count, row))
    return shares


def _outgoing(
    assignment: list[list[list[int]]],
    metas: Sequence[Meta],
    responses: dict[int, Response],
    layout: Layout,
    route_shape: RouteShape | None,
) -> dict[int, bytes]:
    """The message to each rank: tokens and log-probabilities of those `responses` that it trains, then its shares of
    their routes.
    """
    placed = [_placed(packs, metas, layout, responses) for packs in assignment]
    tokens = [_tokens([i for pack in packs for i in pack.members if i in responses], responses) for packs in placed]
    shares: dict[tuple[int, int, int], list[_Share]] = {}
    outgoing = {}
    for rank in range(layout.world):
        there = layout.coord(rank)
        key = (there.dp, there.cp, there.tp)
        if route_shape and key not in shares:  # stages of a pipeline see the same rows
            shares[key] = _shares(placed[there.dp], metas, layout, there, responses)
        routes = _routes(shares[key], responses, there, route_shape) if route_shape else []
        outgoing[rank] = b"".join([tokens[there.dp], *routes])
    return outgoing


def _tokens(numbers: list[int], responses: dict[int, Response]) -> bytes:
    """And log-probabilities."""
    return b"".join(
        part
        for i in numbers
        for part in (responses[i].tokens.astype(np.int32).tobytes(), responses[i].logprobs.astype(np.float32).tobytes())
    )


def _routes(shares: list[_Share], responses: dict[int, Response], coord: Coord, route_shape: RouteShape) -> list[bytes]:
    layers = list(route_shape.layers_of_stage[coord.pp])
    found = ((share, responses[share.response].routes) for share in shares)
    return [
        np.ascontiguousarray(routes[share.first : share.last][:, layers], dtype=route_shape.dtype).tobytes()
        for share, routes in found
        if routes is not None
    ]


def _route_bytes(share: _Share, meta: Meta, coord: Coord, route_shape: RouteShape | None) -> int:
    if route_shape is None or not meta.has_routes:
        return 0
    return (
        (share.last - share.first)
        * len(route_shape.layers_of_stage[coord.pp])
        * route_shape.top_k
        * route_shape.dtype.itemsize
    )


def _swap(outgoing: dict[int, bytes], sizes: dict[int, int], parallel: Parallel) -> dict[int, bytes]:
    """One message from each owner to each rank, all in one operation between hosts; what a rank has for itself does not
    travel.
    """
    me, world = parallel.coord.rank, parallel.layout.world
    others = [rank for rank in range(world) if rank != me]
    sent = bytearray().join(outgoing.get(rank, b"") for rank in others)
    sends = [0 if rank == me else len(outgoing.get(rank, b"")) for rank in range(world)]
    receives = [0 if rank == me else sizes.get(rank, 0) for rank in range(world)]
    received = torch.empty(sum(receives), dtype=torch.uint8)
    if world > 1:
        payload = torch.frombuffer(sent, dtype=torch.uint8) if sent else torch.empty(0, dtype=torch.uint8)
        dist.all_to_all_single(received, payload, receives, sends, group=parallel.host_group)
    pieces = received.split(receives)
    result = {owner: pieces[owner].numpy().tobytes() for owner in sizes if receives[owner]}
    if me in outgoing:
        result[me] = outgoing[me]
    return result


def _fill(
    packs: list[list[int]],
    shares: list[_Share],
    metas: Sequence[Meta],
    incoming: dict[int, bytes],
    parallel: Parallel,
    route_shape: RouteShape | None,
) -> Exchanged:
    read = {owner: _Reader(data) for owner, data in incoming.items()}
    tokens: dict[int, Tensor] = {}
    logprobs: dict[int, np.ndarray] = {}
    for i in (i for members in packs for i in members):
        meta = metas[i]
        tokens[i] = torch.from_numpy(read[meta.owner].take(np.dtype(np.int32), meta.tokens).astype(np.int64))
        logprobs[i] = read[meta.owner].take(np.dtype(np.float32), meta.tokens - meta.prompt_len)
    filled = []
    for members, length in zip(packs, _lengths(packs, metas, parallel.layout), strict=True):
        prompt_lens = [metas[i].prompt_len for i in members]
        pack = make_pack(members, [tokens[i] for i in members], prompt_lens, length, parallel.layout, parallel.coord)
        pack.rollout.logprobs = scatter_rows(pack, [logprobs[i] for i in members], prompt_lens)
        filled.append(pack)
    total = _fill_routes(filled, shares, metas, read, parallel, route_shape) if route_shape is not None else 0
    return Exchanged(filled, total)


def _fill_routes(
    filled: list[Pack],
    shares: list[_Share],
    metas: Sequence[Meta],
    read: dict[int, _Reader],
    parallel: Parallel,
    route_shape: RouteShape,
) -> int:
    """Returns the bytes of the routes that came."""
    layers, dtype, total = len(route_shape.layers_of_stage[parallel.coord.pp]), route_shape.dtype, 0
    into = []
    for pack in filled:
        _spread(pack, parallel, route_shape, layers)
        assert pack.rollout.routes is not None and pack.rollout.has_route is not None
        into.append((pack.rollout.routes.numpy(), pack.rollout.has_route.numpy()))  # views, see scatter_rows
    for share in shares:
        meta, (routes, has_route) = metas[share.response], into[share.pack]
        if meta.has_routes:
            n = share.last - share.first
            raw = read[meta.owner].take(dtype, n * layers * route_shape.top_k)
            routes[share.row : share.row + n] = raw.reshape(n, layers, route_shape.top_k)
            has_route[share.row : share.row + n] = True
            total += raw.nbytes
    return total


def _spread(pack: Pack, parallel: Parallel, route_shape: RouteShape, layers: int) -> None:
    rows = router_rows(pack.padded, parallel.layout, parallel.coord)
    spread = spread_routes(len(rows), layers, route_shape.num_experts, route_shape.top_k, start=int(rows[0]))
    pack.rollout.routes = spread.to(torch.int16)
    pack.rollout.has_route = rows >= pack.rows  # padding replays its spread routes


def attach_routes(pack: Pack, full: Tensor, parallel: Parallel, route_shape: RouteShape) -> None:
    """Gives a pack this rank's part of routes that every rank has: full is [rows without
    padding, all MoE layers, K].
    """
    layers = list(route_shape.layers_of_stage[parallel.coord.pp])
    _spread(pack, parallel, route_shape, len(layers))
    assert pack.rollout.routes is not None and pack.rollout.has_route is not None
    rows = router_rows(pack.padded, parallel.layout, parallel.coord)
    real = rows < pack.rows
    pack.rollout.routes[real], pack.rollout.has_route[real] = full[rows[real]][:, layers].to(torch.int16), True


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._offset = data, 0

    def take(self, dtype: np.dtype, count: int) -> np.ndarray:
        out = np.frombuffer(self._data, dtype=dtype, count=count, offset=self._offset)
        self._offset += out.nbytes
        return out


def gather_metas(local_metas: list[Meta], parallel: Parallel, fault: str | Stopped | None = None) -> list[Meta]:
    """The metas of all responses, on every rank, in order of their groups; within one in their owner's order.

    Where a rank has a `fault`, every rank raises it, a text as a UserError: none is left waiting for the one that found
    it.
    """
    everyone: list[tuple[list[Meta], str | Stopped | None]] = [([], None)] * parallel.layout.world
    dist.all_gather_object(everyone, (local_metas, fault), group=parallel.host_group)
    for failure in (failure for _, failure in everyone if failure):
        raise failure if isinstance(failure, Stopped) else UserError(failure)
    return sorted((meta for metas, _ in everyone for meta in metas), key=lambda meta: meta.group)


def minibatches(metas: Sequence[Meta], groups: Sequence[int], count: int) -> Iterator[list[int]]:
    """Indices of each mini-batch: `groups` (values of Meta.group) in
    order, cut into `count` parts of whole groups, as even as can be.

    With fewer groups than `count`, one mini-batch a group.
    """
    for part in np.array_split(np.array(groups), min(count, len(groups))) if len(groups) else []:
        chosen = set(part.tolist())
        yield [i for i, meta in enumerate(metas) if meta.group in chosen]
