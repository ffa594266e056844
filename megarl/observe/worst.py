"""rollouts/worst.jsonl: the response tokens on which the two engines differ most, step by step, in their text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megarl.observe.metrics import read_rows

if TYPE_CHECKING:
    from megarl.engine.batch import Pack

COUNT = 8  # tokens a step
BEFORE, AFTER = 24, 8  # tokens of context around each
FILE = "rollouts/worst.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class TokenNotes:
    """What a step keeps of single tokens. worst: those on which the engines differ most, largest first. sampled: number
    of a response that is shown to people -> log pi_old of its tokens.
    """

    worst: list[Row] = field(default_factory=list)
    sampled: dict[int, list[float]] = field(default_factory=dict)


def take_notes(packs: list[Pack], sampled: list[int]) -> TokenNotes:
    """Of this rank's packs, after a pass for pi_old. sampled: the responses to show."""
    return TokenNotes(worst_of(packs), logprobs_of(packs, set(sampled)))


def logprobs_of(packs: list[Pack], responses: set[int]) -> dict[int, list[float]]:
    """log pi_old of the tokens that are learnt from, for each of these responses that lies in these packs."""
    logprobs = {}
    for pack in packs:
        for place, response in enumerate(pack.responses):
            if response in responses and pack.passes.old_logprobs is not None:
                rows = (pack.seq_ids == place) & (pack.mask > 0)
                logprobs[response] = pack.passes.old_logprobs.cpu().float()[rows.cpu()].tolist()
    return logprobs


def worst_of(packs: list[Pack]) -> list[Row]:
    """The COUNT response tokens of these packs with the largest |log
    pi_old - log mu|, largest first, as token numbers with context.
    """
    worst: list[Row] = []
    for pack in packs:
        if pack.passes.old_logprobs is None or not pack.rows:
            continue
        old = pack.passes.old_logprobs.cpu().float()
        difference = ((old - pack.rollout.logprobs).abs() * pack.mask).nan_to_num(posinf=torch.finfo(torch.float32).max)
        least = worst[-1]["difference"] if len(worst) == COUNT else -1.0  # of the packs before
        for value, row in zip(*difference.topk(min(COUNT, pack.padded)), strict=True):
            if pack.mask[row] and value > least:
                worst.append(_row(pack, int(row), float(value), float(old[row])))
        worst = sorted(worst, key=lambda token: -token["difference"])[:COUNT]
    return worst


def _row(pack: Pack, row: int, difference: float, old: float) -> Row:
    first = row - int(pack.positions[row])  # of the response's rows
    same = (pack.seq_ids[row + 1 : row + 1 + AFTER] == pack.seq_ids[row]).sum()
    return {
        "difference": difference,
        "rollout": float(pack.rollout.logprobs[row]),
        "trainer": old,
        "before": pack.tokens[max(first, row + 1 - BEFORE) : row + 1].tolist(),
        "token": [int(pack.labels[row])],
        "after": pack.labels[row + 1 : row + 1 + int(same)].tolist(),
    }


def gather_notes(local: TokenNotes, hosts: dist.ProcessGroup | None = None) -> TokenNotes:
    """All ranks' notes at rank 0, of the worst tokens COUNT; nothing elsewhere. Every rank must call it. hosts: of all
    ranks, for host memory; None is the default group.
    """
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(local, everyone, dst=0, group=hosts)
    worst = sorted((row for notes in everyone or [] for row in notes.worst), key=lambda row: -row["difference"])
    return TokenNotes(worst[:COUNT], {n: values for notes in everyone or [] for n, values in notes.sampled.items()})


def write_worst(run_dir: Path, step: int, rows: list[Row], decode: Callable[[list[int]], str]) -> None:
    """Appends one line for `step`. A step that is done again after a
    resume is written again; the last line of a step counts.
    """
    texts = [row | {part: decode(row[part]) for part in ("before", "token", "after")} for row in rows]
    path = run_dir / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            file.write(b"\n")  # a crash cut the last line short; this one shall be whole
        file.write(json.dumps({"step": step, "tokens": texts}).encode() + b"\n")


def read_worst(run_dir: Path, first_step: int, count: int) -> list[Row]:
    """The `count` worst tokens of the steps from `first_step` on,
    largest first, each with its step; empty where none were written.
    """
    if not (run_dir / FILE).is_file():
        return []
    tokens = [
        token | {"step": row["step"]}
        for row in read_rows(run_dir / FILE)
        if row["step"] >= first_step
        for token in row["tokens"]
    ]
    return sorted(tokens, key=lambda token: -token["difference"])[:count]
