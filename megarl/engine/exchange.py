"""From the ranks that fetched the responses to the ranks that train them: every tensor moves once, straight to its owner.

Each rank of a data-parallel replica needs the tokens and rollout log-probabilities of its replica's responses, and of the routes
only the rows of its own sequence-parallel slice and the layers of its own stage. Every rank knows the whole assignment, so both
sides compute the same byte layout and nothing but payload travels: one message from each owner to each rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.engine.batch import Meta, Pack, make_pack, padded_rows, router_rows, scatter_rows
from megarl.engine.parallel import Parallel
from megarl.replay.routes import route_dtype, spread_routes
from megarl.rollout.response import Response
from megarl.weights.layout import Coord, Layout


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
    """One response inside one pack, and the part of its routes one rank needs: rows [first, last) of the response."""

    response: int
    pack: int
    place: int  # among the pack's responses
    first: int
    last: int
    row: int  # where row `first` lies in the rank's slice of the pack


def exchange(
    assignment: list[list[list[int]]],
    metas: Sequence[Meta],
    advantages: Tensor,
    denominators: Tensor,
    responses: dict[int, Response],
    parallel: Parallel,
    routes: RouteShape | None,
) -> tuple[list[Pack], int]:
    """This rank's packs, filled, and the bytes of routes it received.

    assignment: packs[replica][pack] -> indices into metas. advantages, denominators: [len(metas)]. responses: those this rank fetched,
    by the same index. routes: None if none travel.
    """
    layout, me = parallel.layout, parallel.coord
    shares = {rank: _shares(assignment[layout.coord(rank).dp], metas, layout, layout.coord(rank)) for rank in range(layout.world)}
    owners = sorted({meta.owner for meta in metas})
    outgoing = {}
    if responses:
        for rank, items in shares.items():
            layers = list(routes.layers_of_stage[layout.coord(rank).pp]) if routes else []
            outgoing[rank] = b"".join(_encode(s, responses[s.response], layers, routes) for s in items if s.response in responses)
    sizes = {o: sum(_size(s, metas[s.response], me, routes) for s in shares[me.rank] if metas[s.response].owner == o) for o in owners}
    incoming = _swap(outgoing, sizes, parallel)
    packs, received = _fill(assignment[me.dp], shares[me.rank], metas, incoming, parallel, routes)
    for pack in packs:
        for start, i in zip(pack.starts, pack.responses):
            rows = slice(start, start + metas[i].rows)
            pack.advantages[rows], pack.denominators[rows], pack.group_ids[rows] = advantages[i], denominators[i], metas[i].prompt
    return packs, received


def _shares(packs: list[list[int]], metas: Sequence[Meta], layout: Layout, coord: Coord) -> list[_Share]:
    found = []
    for number, members in enumerate(packs):
        rows = router_rows(padded_rows(sum(metas[i].rows for i in members), layout) or layout.tp, layout, coord)
        start = 0
        for place, i in enumerate(members):
            first = min(max(rows.start - start, 0), metas[i].rows)
            last = max(min(rows.stop - start, metas[i].rows), first)
            found.append(_Share(i, number, place, first, last, start + first - rows.start))
            start += metas[i].rows
    return found


def _encode(share: _Share, response: Response, layers: list[int], routes: RouteShape | None) -> bytes:
    parts = [response.tokens.astype(np.int32).tobytes(), response.logprobs.astype(np.float32).tobytes()]
    if routes is not None and response.routes is not None:
        parts.append(np.ascontiguousarray(response.routes[share.first : share.last][:, layers], dtype=routes.dtype).tobytes())
    return b"".join(parts)


def _route_bytes(share: _Share, meta: Meta, coord: Coord, routes: RouteShape | None) -> int:
    if routes is None or not meta.has_routes:
        return 0
    return (share.last - share.first) * len(routes.layers_of_stage[coord.pp]) * routes.top_k * routes.dtype.itemsize


def _size(share: _Share, meta: Meta, coord: Coord, routes: RouteShape | None) -> int:
    return 4 * meta.tokens + 4 * (meta.tokens - meta.prompt_len) + _route_bytes(share, meta, coord, routes)


def _swap(outgoing: dict[int, bytes], sizes: dict[int, int], parallel: Parallel) -> dict[int, bytes]:
    """One message from each owner to each rank; what a rank has for itself does not travel."""
    me, device = parallel.coord.rank, parallel.device.device
    received = {owner: torch.empty(size, dtype=torch.uint8, device=device) for owner, size in sizes.items() if owner != me and size}
    work = [dist.irecv(buffer, src=owner) for owner, buffer in received.items()]
    keep = []
    for rank, payload in outgoing.items():
        if rank != me and payload:
            keep.append(torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device))
            work.append(dist.isend(keep[-1], dst=rank))
    for item in work:
        item.wait()
    result = {owner: bytes(buffer.cpu().numpy()) for owner, buffer in received.items()}
    if me in outgoing:
        result[me] = outgoing[me]
    return result


def _fill(
    packs: list[list[int]],
    shares: list[_Share],
    metas: Sequence[Meta],
    incoming: dict[int, bytes],
    parallel: Parallel,
    routes: RouteShape | None,
) -> tuple[list[Pack], int]:
    read = {owner: _Reader(data) for owner, data in incoming.items()}
    tokens: dict[int, Tensor] = {}
    logprobs: dict[int, Tensor] = {}
    pieces: list[tuple[_Share, Tensor]] = []
    total = 0
    layers = len(routes.layers_of_stage[parallel.coord.pp]) if routes else 0
    for share in shares:
        meta = metas[share.response]
        reader = read[meta.owner]
        tokens[share.response] = torch.from_numpy(reader.take(np.int32, meta.tokens).astype(np.int64))
        logprobs[share.response] = torch.from_numpy(reader.take(np.float32, meta.tokens - meta.prompt_len).copy())
        if routes is not None and meta.has_routes:
            shape = (share.last - share.first, layers, routes.top_k)
            raw = reader.take(routes.dtype, int(np.prod(shape))).reshape(shape)
            pieces.append((share, torch.from_numpy(raw.astype(np.int16))))
            total += _route_bytes(share, meta, parallel.coord, routes)
    filled = []
    for members in packs:
        prompt_lens = [metas[i].prompt_len for i in members]
        pack = make_pack(members, [tokens[i] for i in members], prompt_lens, parallel.layout)
        pack.rollout_logprobs = scatter_rows(pack, [logprobs[i] for i in members], prompt_lens)
        filled.append(pack)
    if routes is not None:
        _place_routes(filled, pieces, parallel, routes, layers)
    return filled, total


def _place_routes(filled: list[Pack], pieces: list[tuple[_Share, Tensor]], parallel: Parallel, routes: RouteShape, layers: int) -> None:
    for pack in filled:
        _spread(pack, parallel, routes, layers)
    for share, piece in pieces:
        pack = filled[share.pack]
        assert pack.routes is not None and pack.present is not None
        pack.routes[share.row : share.row + len(piece)] = piece
        pack.present[share.row : share.row + len(piece)] = True


def _spread(pack: Pack, parallel: Parallel, routes: RouteShape, layers: int) -> None:
    rows = router_rows(pack.padded, parallel.layout, parallel.coord)
    spread = spread_routes(rows.stop - rows.start, layers, routes.num_experts, routes.top_k, start=rows.start)
    pack.routes = spread.to(torch.int16)
    pack.present = torch.arange(rows.start, rows.stop) >= pack.rows  # padding replays its spread routes


def attach_routes(pack: Pack, full: Tensor, parallel: Parallel, routes: RouteShape) -> None:
    """Gives a pack this rank's part of routes that every rank has: full is [rows without padding, all MoE layers, K]."""
    layers = list(routes.layers_of_stage[parallel.coord.pp])
    _spread(pack, parallel, routes, len(layers))
    rows = router_rows(pack.padded, parallel.layout, parallel.coord)
    mine = full[rows][:, layers].to(torch.int16)
    assert pack.routes is not None and pack.present is not None
    pack.routes[: len(mine)], pack.present[: len(mine)] = mine, True


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, dtype: np.dtype | type, count: int) -> np.ndarray:
        out = np.frombuffer(self._data, dtype=dtype, count=count, offset=self._at)
        self._at += out.nbytes
        return out


def gather_metas(mine: list[Meta], parallel: Parallel) -> list[Meta]:
    """The metas of all responses, on every rank, in prompt order (a prompt's responses stay in their owner's order)."""
    everyone: list[list[Meta]] = [[] for _ in range(parallel.layout.world)]
    dist.all_gather_object(everyone, mine)
    return sorted((meta for rank in everyone for meta in rank), key=lambda meta: meta.prompt)


def minibatches(metas: Sequence[Meta], prompts: int, count: int) -> Iterator[list[int]]:
    """Indices of each mini-batch: prompts / count whole groups, in prompt order."""
    each = prompts // count
    for m in range(count):
        yield [i for i, meta in enumerate(metas) if m * each <= meta.prompt < (m + 1) * each]
