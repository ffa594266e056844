"""`megarl score`: teacher-forced log-probabilities, entropy and routes
of given tokens, by the training engine in any layout.

In:  {"tokens": prompt + response, "prompt_len": n, "routes": optional base64 npy [T-1, L, K]} a line.
Out: {"logprobs": [T-1], "entropy": [T-1], "routes": base64 npy [T-1, L, K]} a line, in the order of the input.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megarl.commands.arguments import parse
from megarl.config import Config, load_config
from megarl.engine.batch import Pack, assign, make_packs, router_rows
from megarl.engine.build import Engine, build_engine, route_shape
from megarl.engine.exchange import attach_routes
from megarl.engine.parallel import destroy_parallel
from megarl.engine.step import TokenScores
from megarl.errors import UserError
from megarl.replay.routes import accept_routes
from megarl.weights.map.weight_map import WeightMap, load_hf_config


def main(argv: list[str]) -> int:
    args = parse("score", argv)
    config = load_config(args.config, args.overrides)
    rows = read_rows(Path(args.input), config, WeightMap(load_hf_config(config.model.path)))
    engine = build_engine(config, temperature=config.score.temperature)
    scored = score(rows, engine, config)
    if engine.model.parallel.is_main:
        partial = Path(args.output + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in scored), encoding="utf-8")
        os.replace(partial, args.output)
    dist.barrier()
    destroy_parallel()
    return 0


def read_rows(path: Path, config: Config, weight_map: WeightMap) -> list[dict[str, Any]]:
    """The input's rows, routes decoded; UserError names the first wrong line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # not at U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            tokens = row["tokens"]
            if not (isinstance(tokens, list) and len(tokens) >= 2 and all(isinstance(t, int) for t in tokens)):
                raise ValueError("'tokens' is not a list of at least two token ids")
            if not 0 <= min(tokens) <= max(tokens) < weight_map.vocab_size:
                raise ValueError(f"a token lies outside the vocabulary of {weight_map.vocab_size}")
            if row.get("routes") is not None:
                row["routes"] = _routes(row["routes"], len(tokens) - 1, weight_map)
        except (ValueError, KeyError, TypeError) as error:
            what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path} line {number}: {what}; a row is {{'tokens', 'prompt_len', 'routes'?}}") from None
        if row.get("routes") is not None and config.replay_mode == "none":
            raise UserError(
                f"{path} line {number} has routes, but replay.mode is none; set replay.mode=R3 or drop them"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"--input {str(path)!r} holds no rows")
    return rows


def _routes(text: str, rows: int, weight_map: WeightMap) -> np.ndarray:
    try:
        routes = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
        return accept_routes(
            routes, rows, weight_map.moe_layers, weight_map.num_layers, weight_map.num_experts, weight_map.top_k
        )
    except (ValueError, TypeError, EOFError, AttributeError) as error:
        raise ValueError(f"'routes': {error}") from None


def score(rows: list[dict[str, Any]], engine: Engine, config: Config) -> list[dict[str, Any]]:
    """Output rows, on rank 0 (empty elsewhere). Responses with and without routes go into packs of their own."""
    at, shape = engine.model.parallel, route_shape(engine.model)
    results: dict[int, dict[str, Any]] = {}
    for replay in (False, True):
        members = [i for i, row in enumerate(rows) if (row.get("routes") is not None) == replay]
        if not members:
            continue
        multiple = at.layout.pp if at.layout.vpp > 1 else 1
        assigned = assign(
            [len(rows[i]["tokens"]) - 1 for i in members], at.layout.dp, config.engine.micro_batch_tokens, multiple
        )
        tokens = [torch.tensor(row["tokens"]) for row in rows]
        numbers = [[members[i] for i in chosen] for chosen in assigned[at.coord.dp]]
        packs = make_packs(numbers, tokens, [1] * len(rows), at.layout, at.coord)
        if replay:
            none = np.zeros((0, len(engine.model.weight_map.moe_layers), shape.top_k), np.int16)
            for pack in packs:
                full = np.concatenate([none, *(rows[i]["routes"].astype(np.int16) for i in pack.responses)])
                attach_routes(pack, torch.from_numpy(full), at, shape)
        scored = engine.logprobs(packs, "replay" if replay else "record")
        for whole in gather_packs(engine, packs, scored, (LIVE_ROUTES,)):
            live = whole.values.get(LIVE_ROUTES, np.zeros((whole.rows, 0, shape.top_k)))  # a dense model has none
            for i, span in whole.spans():
                routes = live[span] if rows[i].get("routes") is None else rows[i]["routes"]
                results[i] = {
                    "logprobs": whole.values["logprobs"][span].tolist(),
                    "entropy": whole.values["entropy"][span].tolist(),
                    "routes": encode_npy(routes.astype(shape.dtype)),
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
        for i, start, end in zip(self.responses, self.starts, [*self.starts[1:], self.rows], strict=True):
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
    at, shape = engine.model.parallel, route_shape(engine.model)
    mine = [_part(engine, pack, scored[n] if scored else None, names) for n, pack in enumerate(packs)]
    everyone: list[Any] = [None] * at.layout.world
    dist.gather_object(mine, everyone if at.is_main else None, dst=0)
    whole = []
    for dp in range(at.layout.dp) if at.is_main else []:
        ranks = [rank for rank in range(at.layout.world) if at.layout.coord(rank).dp == dp]
        for n, pack in enumerate(everyone[ranks[0]]):
            values: dict[str, np.ndarray] = {}
            for rank in ranks:
                part = everyone[rank][n]
                values |= part["values"]
                layers = list(shape.layers_of_stage[at.layout.coord(rank).pp])
                for name, piece in part["by_layer"].items():
                    size = (part["padded"], len(engine.model.weight_map.moe_layers), *piece.shape[2:])
                    values.setdefault(name, np.zeros(size, piece.dtype))[np.ix_(part["at"], layers)] = piece
            whole.append(WholePack(pack["responses"], pack["starts"], pack["rows"], values))
    return whole


def _part(engine: Engine, pack: Pack, scored: TokenScores | None, names: tuple[str, ...]) -> dict[str, Any]:
    """What this rank knows of one of its packs: its own rows and
    layers; on the last stage also what is the same on all its ranks.
    """
    at = engine.model.parallel
    found = {name: value.cpu().numpy() for name in names if (value := attrgetter(name)(pack)) is not None}
    if HAS_ROUTE in found:  # one value a row, here as one a layer too
        found[HAS_ROUTE] = np.broadcast_to(found[HAS_ROUTE][:, None], found[ROUTES].shape[:2])
    part: dict[str, Any] = {
        "responses": pack.responses,
        "starts": pack.starts,
        "rows": pack.rows,
        "padded": pack.padded,
    }
    part["by_layer"] = {name: value for name, value in found.items() if name in _BY_LAYER}
    part["at"] = router_rows(pack.padded, at.layout, at.coord).numpy()
    part["values"] = {}
    if scored is not None and at.coord.tp == at.coord.cp == 0:
        logprobs, entropy = (x.cpu().numpy() for x in scored)
        part["values"] = {
            "logprobs": logprobs,
            "entropy": entropy,
            **{k: v for k, v in found.items() if k not in _BY_LAYER},
        }
    return part


def encode_npy(array: np.ndarray) -> str:
    """base64 of the array in numpy's .npy format."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
