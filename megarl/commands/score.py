"""`megarl score`: teacher-forced log-probabilities, entropy and routes
of given tokens, by the training engine in any layout.

In:  {"tokens": prompt + response, "prompt_len": n, "routes": optional base64 npy [T-1, L, K]} a line.
Out: {"logprobs": [T-1], "entropy": [T-1], "routes": base64 npy [T-1, L, K]} a line, in the order of the input, with the
prompt, text, answer and reward that `megarl generate` may have put there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megarl.announce import announce
from megarl.commands.arguments import parse
from megarl.commands.jsonl import encode_npy, rows_to
from megarl.commands.score_input import count_rows, read_rows
from megarl.config import Config, load_config
from megarl.engine.batch import Pack, assign, make_packs, router_rows
from megarl.engine.build import Engine, build_engine, route_shape
from megarl.engine.exchange import attach_routes
from megarl.engine.parallel import destroy_parallel
from megarl.engine.step import TokenScores
from megarl.observe.progress import Rows

PACKS_A_CHUNK = 8  # full ones of each replica: what is in memory at a time
READABLE = ("prompt", "text", "answer", "reward")


def main(argv: list[str]) -> int:
    args = parse("score", argv)
    config = load_config(args.config, args.overrides)
    announce(f"loading the weights of {config.model.path}")
    engine = build_engine(config, temperature=config.score.temperature)
    if engine.model.parallel.is_main:
        shown = Rows("scored", count_rows(Path(args.input)))
        with rows_to(args.output) as write:
            for scored in score_file(Path(args.input), engine, config):
                for row in scored:
                    write(row)
                shown.add(len(scored))
        shown.close()
        print(f"wrote {args.output}")
    else:
        for _ in score_file(Path(args.input), engine, config):
            pass
    dist.barrier(group=engine.model.parallel.host_group)
    destroy_parallel()
    return 0


@dataclass(frozen=True)
class Share:
    """What a replica scores of a chunk of `rows` rows. packs: of each, the numbers of its rows in the chunk.

    tokens, routes: by these numbers; routes int16 [T-1, L, K], or None where this share is routed live.
    """

    rows: int
    packs: list[list[int]]
    tokens: dict[int, list[int]]
    routes: dict[int, np.ndarray] | None


def score_file(path: Path, engine: Engine, config: Config) -> Iterator[list[dict[str, Any]]]:
    """Output rows, chunk by chunk, on rank 0, which alone reads the file (empty lists elsewhere). Collective."""
    parallel = engine.model.parallel
    layout = parallel.layout
    chunks = _chunks(path, engine, config) if parallel.is_main else iter(())
    while True:
        chunk = next(chunks, None)
        shares = _shares(chunk, engine, config) if chunk else [None] * layout.dp
        assigned: list[Any] = [None]
        by_rank = [shares[layout.coord(rank).dp] for rank in range(layout.world)] if parallel.is_main else None
        dist.scatter_object_list(assigned, by_rank, src=0, group=parallel.host_group)
        if assigned[0] is None:
            return
        yield _score(assigned[0], chunk or [], engine)


def _chunks(path: Path, engine: Engine, config: Config) -> Iterator[list[dict[str, Any]]]:
    budget = PACKS_A_CHUNK * engine.model.parallel.layout.dp * config.engine.micro_batch_tokens
    chunk: list[dict[str, Any]] = []
    tokens = 0
    for row in read_rows(path, config, engine.model.weight_map):
        chunk.append(row)
        tokens += len(row["tokens"])
        if tokens >= budget:
            yield chunk
            chunk, tokens = [], 0
    if chunk:
        yield chunk


def _shares(chunk: list[dict[str, Any]], engine: Engine, config: Config) -> list[list[Share]]:
    """For each replica its shares. Rows with and without routes go into packs of their own."""
    layout = engine.model.parallel.layout
    shares: list[list[Share]] = [[] for _ in range(layout.dp)]
    for replay in (False, True):
        members = [i for i, row in enumerate(chunk) if (row.get("routes") is not None) == replay]
        if not members:
            continue
        lengths = [len(chunk[i]["tokens"]) - 1 for i in members]
        assigned = assign(lengths, layout.dp, config.engine.micro_batch_tokens, layout.packs_multiple)
        for replica, places in enumerate(assigned):
            packs = [[members[i] for i in pack] for pack in places]
            numbers = [i for pack in packs for i in pack]
            routes = {i: chunk[i]["routes"].astype(np.int16) for i in numbers} if replay else None
            shares[replica].append(Share(len(chunk), packs, {i: chunk[i]["tokens"] for i in numbers}, routes))
    return shares


def _score(shares: list[Share], chunk: list[dict[str, Any]], engine: Engine) -> list[dict[str, Any]]:
    """The chunk's output rows on rank 0, which has the chunk; none elsewhere."""
    parallel, shape = engine.model.parallel, route_shape(engine.model)
    results: dict[int, dict[str, Any]] = {}
    for share in shares:
        tokens = [torch.tensor(share.tokens.get(i, [0]), dtype=torch.long) for i in range(share.rows)]
        packs = make_packs(share.packs, tokens, [1] * share.rows, parallel.layout, parallel.coord)
        if share.routes is not None:
            none = np.zeros((0, len(engine.model.weight_map.moe_layers), shape.top_k), np.int16)
            for pack in packs:
                full = np.concatenate([none, *(share.routes[i] for i in pack.responses)])
                attach_routes(pack, torch.from_numpy(full), parallel, shape)
        scored = engine.logprobs(packs, "record" if share.routes is None else "replay")
        for whole in gather_packs(engine, packs, scored, (LIVE_ROUTES,)):
            live = whole.values.get(LIVE_ROUTES, np.zeros((whole.rows, 0, shape.top_k)))  # a dense model has none
            for i, span in whole.spans():
                given = chunk[i].get("routes")
                results[i] = {key: chunk[i][key] for key in READABLE if key in chunk[i]} | {
                    "logprobs": whole.values["logprobs"][span].tolist(),
                    "entropy": whole.values["entropy"][span].tolist(),
                    "routes": encode_npy((live[span] if given is None else given).astype(shape.dtype)),
                }
    return [results[i] for i in sorted(results)]


@dataclass
class WholePack:
    """One pack of one replica, put together on rank 0 from the ranks that hold its rows and its layers."""

    responses: list[int]
    starts: list[int]
    rows: int
    values: dict[str, np.ndarray]  # name -> [padded rows, ...]

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Each response with its rows."""
        ends = [*self.starts, self.rows][1:]  # none of a pack without responses
        for i, start, end in zip(self.responses, self.starts, ends, strict=True):
            yield i, slice(start, end)


LIVE_ROUTES, SCORE_GAP = "passes.live_routes", "passes.score_gap"
ROUTES, HAS_ROUTE = "rollout.routes", "rollout.has_route"
_BY_LAYER = (LIVE_ROUTES, SCORE_GAP, ROUTES, HAS_ROUTE)


def gather_packs(
    engine: Engine, packs: list[Pack], scored: list[TokenScores], names: tuple[str, ...]
) -> list[WholePack]:
    """The packs of all replicas on rank 0 (none elsewhere): log-probabilities
    and entropy as `scored`, and the fields `names` of Pack, dotted.

    Collective. Fields by layer come as [rows, all MoE layers, ...]; a field that no rank holds is left out.
    """
    parallel, shape = engine.model.parallel, route_shape(engine.model)
    parts = [_part(engine, pack, scored[n] if scored else None, names) for n, pack in enumerate(packs)]
    everyone: list[Any] = [None] * parallel.layout.world
    dist.gather_object(parts, everyone if parallel.is_main else None, dst=0, group=parallel.host_group)
    whole = []
    for dp in range(parallel.layout.dp) if parallel.is_main else []:
        ranks = [rank for rank in range(parallel.layout.world) if parallel.layout.coord(rank).dp == dp]
        for n, pack in enumerate(everyone[ranks[0]]):
            values: dict[str, np.ndarray] = {}
            for rank in ranks:
                part = everyone[rank][n]
                values |= part["values"]
                layers = list(shape.layers_of_stage[parallel.layout.coord(rank).pp])
                for name, piece in part["by_layer"].items():
                    size = (part["padded"], len(engine.model.weight_map.moe_layers), *piece.shape[2:])
                    values.setdefault(name, np.zeros(size, piece.dtype))[np.ix_(part["router_rows"], layers)] = piece
            whole.append(WholePack(pack["responses"], pack["starts"], pack["rows"], values))
    return whole


def _part(engine: Engine, pack: Pack, scored: TokenScores | None, names: tuple[str, ...]) -> dict[str, Any]:
    """What this rank knows of one of its packs: its own rows and
    layers; on the last stage also what is the same on all its ranks.
    """
    parallel = engine.model.parallel
    fields = {name: value.cpu().numpy() for name in names if (value := attrgetter(name)(pack)) is not None}
    if HAS_ROUTE in fields:  # one value a row, here as one a layer too
        fields[HAS_ROUTE] = np.broadcast_to(fields[HAS_ROUTE][:, None], fields[ROUTES].shape[:2])
    part: dict[str, Any] = {
        "responses": pack.responses,
        "starts": pack.starts,
        "rows": pack.rows,
        "padded": pack.padded,
    }
    part["by_layer"] = {name: value for name, value in fields.items() if name in _BY_LAYER}
    part["router_rows"] = router_rows(pack.padded, parallel.layout, parallel.coord).numpy()
    part["values"] = {}
    if scored is not None and parallel.coord.tp == parallel.coord.cp == 0:
        logprobs, entropy = (x.cpu().numpy() for x in scored)
        part["values"] = {
            "logprobs": logprobs,
            "entropy": entropy,
            **{k: v for k, v in fields.items() if k not in _BY_LAYER},
        }
    return part


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
