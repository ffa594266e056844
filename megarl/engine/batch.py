"""Responses into packs: who trains which response, where its rows lie, and which of them a rank's routers see.

A response of T tokens gives T - 1 rows: row i has token i as input and token i + 1 as
label. The last token is never an input, so routes and rows correspond one to one.
Everything per token (labels, masks, log-probabilities, routes) lives in these rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from megarl.engine.attention import PackedSequences, packed_sequences, ramps
from megarl.weights.map.layout import Coord, Layout


@dataclass(frozen=True)
class Meta:
    """What every rank knows of every response: enough to assign it."""

    group: int  # place in the global batch, 0 .. B - 1, and on from there in refilled batches
    prompt_len: int
    tokens: int  # prompt and response
    reward: float
    version: int  # weight version of its oldest token
    owner: int  # the rank that holds the response
    has_routes: bool
    truncated: bool
    line: int = 0  # of the prompt in its file
    fault: str = ""  # why this sample cannot be used
    spans: tuple[tuple[int, int, int], ...] = ()  # (version, start, end) over its response tokens

    @property
    def rows(self) -> int:
        return self.tokens - 1


@dataclass
class RolloutRows:
    """What a pack's responses bring with them, in rows; megarl/engine/exchange.py fills it in. T rows of the pack,
    R rows of this rank, L its MoE layers, K experts a token.
    """

    logprobs: Tensor  # float32 [T]: log mu
    rewards: Tensor  # float32 [T]: the reward of the response, on each of its rows
    advantages: Tensor  # float32 [T]: of the response in its group, on each of its rows; under gae its reward
    group_ids: Tensor  # int64 [T]; -1 is padding
    denominators: Tensor  # float32 [T]: what each token's loss is divided by (megarl.objective.denominators)
    routes: Tensor | None = None  # int16 [R, L, K]
    has_route: Tensor | None = None  # bool [R]; None where every row has one


@dataclass
class PassRows:
    """What the passes over a pack leave behind, in rows; None until the pass has run. Values of tokens are on the last
    stage. T rows of the pack, R rows of this rank, L its MoE layers, K experts a token.
    """

    old_logprobs: Tensor | None = None  # float32 [T]: log pi_old
    logprobs: Tensor | None = None  # float32 [T]: log pi of the last update, detached
    ref_logprobs: Tensor | None = None  # float32 [T]: of the reference model
    old_values: Tensor | None = None  # float32 [T]: of the critic, before its first update on this batch
    advantages: Tensor | None = None  # float32 [T]: GAE's
    returns: Tensor | None = None  # float32 [T]: what the critic's values are trained to
    live_routes: Tensor | None = None  # int16 [R, L, K]: the top-k of the live scores in the last pass that ran
    old_routes: Tensor | None = None  # int16 [R, L, K]: the same of the pi_old pass
    score_gap: Tensor | None = None  # float32 [R, L]: how far the given routes lie below the live choice, in score


@dataclass(frozen=True)
class Pack:
    """One micro-batch: the rows of some responses one after the other, padded at the end (see pack_lengths).
    Its layout never changes; `rollout` is filled once, `passes` as the step goes on. All [T] are in rows.
    """

    responses: list[int]  # indices into the global batch, in order of rows
    starts: list[int]  # first row of each
    rows: int  # without padding
    tokens: Tensor  # int64 [T]
    labels: Tensor  # int64 [T]; 0 where there is none
    mask: Tensor  # float32 [T]; 1 where the row predicts a response token that is learnt from
    seq_ids: Tensor  # int64 [T]: place in `responses`; -1 is padding
    positions: Tensor  # int64 [T]
    sequences: PackedSequences
    rollout: RolloutRows
    passes: PassRows

    @property
    def padded(self) -> int:
        return self.tokens.numel()


def cp_spans(padded: int, cp: int) -> list[list[range]]:
    """The rows of a pack that each context-parallel rank computes: of 2 CP equal spans rank r has r and 2 CP - 1 - r,
    so that causal attention costs all ranks the same. One rank has everything."""
    if cp == 1:
        return [[range(padded)]]
    each = padded // (2 * cp)
    return [[range(i * each, (i + 1) * each) for i in (rank, 2 * cp - 1 - rank)] for rank in range(cp)]


def cp_rows(padded: int, cp: int, rank: int) -> Tensor:
    """int64 [padded / CP]: the rows of one context-parallel rank, in the order it holds them."""
    return torch.cat([torch.arange(span.start, span.stop) for span in cp_spans(padded, cp)[rank]])


def router_rows(padded: int, layout: Layout, coord: Coord) -> Tensor:
    """int64 [padded / CP / TP]: the rows that this rank's routers see,
    its sequence-parallel slice of its context-parallel rows.

    Tokens, labels and routes are all cut by this one function or by cp_rows, which it slices.
    """
    cp_local = cp_rows(padded, layout.cp, coord.cp)
    each = len(cp_local) // layout.tp
    return cp_local[coord.tp * each : (coord.tp + 1) * each]


def pack_lengths(rows: list[int], layout: Layout) -> list[int]:
    """Padded lengths of packs, given their rows: multiples of what CP and sequence parallelism cut them into."""
    each = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    return [max(-(-n // each), 1) * each for n in rows]


def assign(rows: list[int], replicas: int, budget: int, multiple: int = 1) -> list[list[list[int]]]:
    """Responses (given by their rows) -> for each data-parallel replica its packs, each a list of indices into `rows`.

    Largest first onto the least loaded replica, then first fit into packs of at most `budget` rows. All replicas get
    the same number of packs, a multiple of `multiple`; surplus packs are empty (with experts spread over replicas, a
    rank that ran fewer micro-batches than another would hang the all-to-all).
    """
    order = sorted(range(len(rows)), key=lambda i: (-rows[i], i))
    load = [0] * replicas
    by_replica: list[list[int]] = [[] for _ in range(replicas)]
    for i in order:
        replica = min(range(replicas), key=lambda r: (load[r], r))
        by_replica[replica].append(i)
        load[replica] += rows[i]
    packed = [_first_fit(members, rows, budget) for members in by_replica]
    count = max(len(packs) for packs in packed)
    count = -(-count // multiple) * multiple
    return [packs + [[] for _ in range(count - len(packs))] for packs in packed]


def _first_fit(members: list[int], rows: list[int], budget: int) -> list[list[int]]:
    packs: list[list[int]] = []
    free: list[int] = []
    for i in members:
        place = next((p for p, room in enumerate(free) if room >= rows[i]), None)
        if place is None:
            packs.append([])
            free.append(budget)
            place = len(packs) - 1
        packs[place].append(i)
        free[place] -= rows[i]
    return [sorted(pack) for pack in packs]


def make_pack(
    responses: list[int], tokens: list[Tensor], prompt_lens: list[int], length: int, layout: Layout, coord: Coord
) -> Pack:
    """Lays out one pack of `length` rows (see pack_lengths). tokens:
    for each response its int64 tokens, prompt included.
    """
    lengths = [len(t) - 1 for t in tokens]
    rows = sum(lengths)
    spans = lengths + ([length - rows] if length > rows else [])
    starts = [0, *accumulate(lengths)][:-1]
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    positions = ramps(torch.zeros(len(spans), dtype=torch.long), torch.tensor(spans, dtype=torch.long))
    answers = positions[:rows] >= torch.tensor(prompt_lens, dtype=torch.long)[owner] - 1
    mask, seq_ids = torch.zeros(length), torch.full((length,), -1)
    mask[:rows], seq_ids[:rows] = answers.float(), owner
    row = torch.arange(rows) + owner  # among all tokens: of each response the last one has no row
    every = torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.long)
    inputs, labels = every.new_zeros(length), every.new_zeros(length)  # they may lie on the device already
    row = row.to(every.device)
    inputs[:rows], labels[:rows] = every[row], every[row + 1]
    return Pack(
        responses=responses,
        starts=starts,
        rows=rows,
        tokens=inputs,
        labels=labels,
        mask=mask,
        seq_ids=seq_ids,
        positions=positions,
        sequences=packed_sequences(spans, cp_spans(length, layout.cp), coord.cp),
        rollout=RolloutRows(
            logprobs=torch.zeros(length),
            rewards=torch.zeros(length),
            advantages=torch.zeros(length),
            group_ids=torch.full((length,), -1),
            denominators=torch.ones(length),
        ),
        passes=PassRows(),
    )


def make_packs(
    assigned: list[list[int]], tokens: list[Tensor], prompt_lens: list[int], layout: Layout, coord: Coord
) -> list[Pack]:
    """The packs of one replica. assigned: for each pack its responses, as indices into tokens and prompt_lens."""
    lengths = pack_lengths([sum(len(tokens[i]) - 1 for i in members) for members in assigned], layout)
    return [
        make_pack(members, [tokens[i] for i in members], [prompt_lens[i] for i in members], length, layout, coord)
        for members, length in zip(assigned, lengths, strict=True)
    ]


def scatter_rows(pack: Pack, values: Sequence[Tensor | np.ndarray], prompt_lens: list[int]) -> Tensor:
    """Per-response values over response tokens -> float32 [T] in rows, zero elsewhere."""
    out = torch.zeros(pack.padded)
    rows = out.numpy()  # a view: torch's own slices cost ten times as much
    for start, prompt_len, value in zip(pack.starts, prompt_lens, values, strict=True):
        rows[start + prompt_len - 1 : start + prompt_len - 1 + len(value)] = value
    return out
