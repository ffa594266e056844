"""`megarl score`: teacher-forced log-probabilities, entropy and routes of given tokens, by the training engine in any layout.

In:  {"tokens": prompt + response, "prompt_len": n, "routes": optional base64 npy [T-1, L, K]} a line.
Out: {"logprobs": [T-1], "entropy": [T-1], "routes": base64 npy [T-1, L, K]} a line, in the order of the input.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megarl.config import Config, load_config
from megarl.engine.batch import Pack, assign, make_packs, router_rows
from megarl.engine.build import Engine, build_engine, route_shape
from megarl.engine.exchange import attach_routes
from megarl.engine.parallel import destroy_parallel
from megarl.errors import UserError
from megarl.replay.routes import check_routes, only_moe_layers
from megarl.weights.weight_map import WeightMap, load_hf_config


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="megarl score")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    rows = read_rows(Path(args.input), config, WeightMap(load_hf_config(config.model.path)))
    engine = build_engine(config, temperature=config.score.temperature)
    scored = score(rows, engine, config)
    if engine.model.parallel.is_main:
        partial = Path(args.output + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in scored))
        os.replace(partial, args.output)
    dist.barrier()
    destroy_parallel()
    return 0


def read_rows(path: Path, config: Config, weight_map: WeightMap) -> list[dict[str, Any]]:
    """The input's rows, routes decoded; UserError names the first wrong line."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            tokens = row["tokens"]
            if not (isinstance(tokens, list) and len(tokens) >= 2 and all(isinstance(t, int) for t in tokens)):
                raise ValueError("'tokens' is not a list of at least two token ids")
            if not 0 <= min(tokens) <= max(tokens) < weight_map.hf["vocab_size"]:
                raise ValueError(f"a token lies outside the vocabulary of {weight_map.hf['vocab_size']}")
            if row.get("routes") is not None:
                row["routes"] = _routes(row["routes"], len(tokens) - 1, weight_map)
        except (ValueError, KeyError, TypeError) as error:
            what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path} line {number}: {what}; a row is {{'tokens', 'prompt_len', 'routes'?}}") from None
        if row.get("routes") is not None and config.replay_mode == "none":
            raise UserError(f"{path} line {number} has routes, but replay.mode is none; set replay.mode=R3 or drop them")
        rows.append(row)
    if not rows:
        raise UserError(f"--input {str(path)!r} holds no rows")
    return rows


def _routes(text: str, rows: int, weight_map: WeightMap) -> np.ndarray:
    routes = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    routes = only_moe_layers(routes, weight_map.moe_layers, weight_map.num_layers)
    wrong = check_routes(routes, rows, len(weight_map.moe_layers), weight_map.num_experts, weight_map.top_k)
    if wrong:
        raise ValueError(f"'routes': {wrong}")
    return routes


def score(rows: list[dict[str, Any]], engine: Engine, config: Config) -> list[dict[str, Any]]:
    """Output rows, on rank 0 (empty elsewhere). Responses with and without routes go into packs of their own."""
    at, shape = engine.model.parallel, route_shape(engine.model)
    results: dict[int, dict[str, Any]] = {}
    for replay in (False, True):
        members = [i for i, row in enumerate(rows) if (row.get("routes") is not None) == replay]
        if not members:
            continue
        multiple = at.layout.pp if at.layout.vpp > 1 else 1
        assigned = assign([len(rows[i]["tokens"]) - 1 for i in members], at.layout.dp, config.engine.micro_batch_tokens, multiple)
        tokens = [torch.tensor(row["tokens"]) for row in rows]
        numbers = [[members[i] for i in chosen] for chosen in assigned[at.coord.dp]]
        packs = make_packs(numbers, tokens, [1] * len(rows), at.layout, at.coord)
        if replay:
            none = np.zeros((0, len(engine.model.weight_map.moe_layers), shape.top_k), np.int16)
            for pack in packs:
                full = np.concatenate([none, *(rows[i]["routes"].astype(np.int16) for i in pack.responses)])
                attach_routes(pack, torch.from_numpy(full), at, shape)
        scored = engine.logprobs(packs, "replay" if replay else "record")
        everyone: list[Any] = [None] * at.layout.world
        dist.all_gather_object(everyone, _mine(engine, packs, scored))
        if at.is_main:
            for i, values in _assemble(everyone, rows, engine).items():
                results[i] = values
    return [results[i] for i in sorted(results)]


def _mine(engine: Engine, packs: list[Pack], scored: list[Any]) -> list[dict[str, Any]]:
    """What this rank knows of each of its packs: own routes of its rows and layers; on the last stage also the scores."""
    at = engine.model.parallel
    found = []
    for n, pack in enumerate(packs):
        mine: dict[str, Any] = {"responses": pack.responses, "starts": pack.starts, "padded": pack.padded}
        mine["own"] = None if pack.own is None else pack.own.cpu().numpy()
        mine["rows"] = router_rows(pack.padded, at.layout, at.coord).numpy()
        if scored and at.coord.tp == 0:
            mine["logprobs"], mine["entropy"] = (x.cpu().numpy() for x in scored[n])
        found.append(mine)
    return found


def _assemble(everyone: list[list[dict[str, Any]]], rows: list[dict[str, Any]], engine: Engine) -> dict[int, dict[str, Any]]:
    weight_map, layout, shape = engine.model.weight_map, engine.model.parallel.layout, route_shape(engine.model)
    out: dict[int, dict[str, Any]] = {}
    for dp in range(layout.dp):
        ranks = [rank for rank in range(layout.world) if layout.coord(rank).dp == dp]
        for n in range(len(everyone[ranks[0]])):
            parts = {rank: everyone[rank][n] for rank in ranks}
            first = parts[ranks[0]]
            own = np.zeros((first["padded"], len(weight_map.moe_layers), weight_map.top_k), shape.dtype)
            for rank, part in parts.items():
                if part["own"] is not None:
                    own[np.ix_(part["rows"], list(shape.layers_of_stage[layout.coord(rank).pp]))] = part["own"]
            scores = next(part for part in parts.values() if "logprobs" in part)
            for i, start in zip(first["responses"], first["starts"]):
                span = slice(start, start + len(rows[i]["tokens"]) - 1)
                routes = own[span] if rows[i].get("routes") is None else rows[i]["routes"].astype(shape.dtype)
                out[i] = {
                    "logprobs": scores["logprobs"][span].tolist(),
                    "entropy": scores["entropy"][span].tolist(),
                    "routes": encode_npy(routes),
                }
    return out


def encode_npy(array: np.ndarray) -> str:
    """base64 of the array in numpy's .npy format."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
