"""`megarl plan --trace`: a rank's step on a simulated GPU, in a process of its own, as tables. Imports no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from megarl.errors import UserError
from megarl.simulate.phases import BUILD, STEP

GIB = 2**30
BAR = 40  # columns
LARGEST = 10


def run(
    config: str,
    overrides: list[str],
    world: int,
    rank: int,
    gpus_per_host: int,
    gpu_gib: float,
    as_json: bool,
    out: str | None,
) -> int:
    """0 where the step fits gpu_gib, 1 where it does not. out: of the page, or none."""
    request = {"config": config, "keys": overrides, "world": world, "rank": rank}
    found = simulated_ranks([request])[0]
    found["link_bytes"] = link_bytes(found, gpus_per_host)
    found["recompute"] = recompute_bytes(config, overrides, world, rank)
    fits = step_peak(found) <= gpu_gib * GIB
    if out is not None:
        from megarl.simulate.page import write_page

        write_page(Path(out), config, found, tables(found), f"{'yes' if fits else 'no'}, of {gpu_gib:g} GiB")
    print(json.dumps(found | {"fits": fits}) if as_json else describe(found, gpu_gib))
    return 0 if fits else 1


def simulated_ranks(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each recorded (figures.py). UserError where the simulation cannot run, or the engine failed in it."""
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    command = [sys.executable, "-W", "ignore", "-m", "megarl.simulate"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for answer in answers:
        if "refused" in answer:
            raise UserError(answer["refused"])
        if "failed" in answer:
            raise UserError(f"--trace: the engine fails on a GPU: {answer['failed']}")
    if len(answers) != len(requests):
        raise UserError(f"--trace: the simulation ended early: {done.stderr.strip()[-300:]}")
    return answers


def step_peak(found: dict[str, Any]) -> int:
    """Bytes, at the worst moment of the whole."""
    return max(peak["bytes"] for peak in found["peaks"].values())


def link_bytes(found: dict[str, Any], gpus_per_host: int) -> dict[str, int]:
    """Bytes that this rank sends in a batch, inside its host and between hosts: by rings, and all-to-all evenly."""
    links = {"inside a host": 0, "between hosts": 0}
    for _, _, ranks, kind, _, _, size in found["sent"]:
        if kind in ("recv", "irecv") or not ranks:
            continue
        here = sum(rank // gpus_per_host == found["rank"] // gpus_per_host for rank in ranks)
        n = len(ranks)
        if kind == "send":
            links["inside a host" if here else "between hosts"] += size
        elif kind.startswith("alltoall"):
            links["inside a host"] += size * (here - 1) // n
            links["between hosts"] += size * (n - here) // n
        else:
            links["inside a host" if here == n else "between hosts"] += _ring_bytes(kind, size, n)
    return links


def _ring_bytes(kind: str, size: int, ranks: int) -> int:
    """That a rank passes on. size: of the tensor that it gives."""
    if "gather" in kind:
        return size * (ranks - 1)
    return size * (ranks - 1) // ranks * (2 if kind.startswith("allreduce") else 1)


def recompute_bytes(config: str, overrides: list[str], world: int, rank: int) -> dict[str, int]:
    """Peak of a step of this rank by engine.recompute, as it is planned (megarl/estimate/memory.py)."""
    from megarl.config import load_config
    from megarl.estimate.memory import Training, stage_memory
    from megarl.weights.map.layout import Layout
    from megarl.weights.map.weight_map import WeightMap, load_hf_config

    tree = load_config(config, overrides)
    engine, layout = tree.engine, Layout(**tree.parallel.model_dump(), world=world)
    weight_map, stage = WeightMap(load_hf_config(tree.model.path)), layout.coord(rank).pp
    itemsize = 4 if engine.dtype == "float32" else 2
    found = {}
    for recompute in ("none", "selective", "full"):
        tokens = engine.micro_batch_tokens
        training = Training(layout, itemsize, engine.distributed_optimizer, recompute, tokens)
        found[recompute] = stage_memory(weight_map, training, stage).total
    return found


def tables(found: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """title -> (figure, what it is of)."""
    worst = max(found["peaks"].values(), key=lambda at: at["bytes"])
    moe = f"{found['moe_layers']} MoE layers on this rank"
    return {
        "largest at the peak, GiB, by the line that allocated it": [
            (f"{size / GIB:.3f}", line) for line, size in worst["lines"][:LARGEST]
        ],
        "bytes sent in the batch, GiB": [(f"{size / GIB:.3f}", link) for link, size in found["link_bytes"].items()],
        "peak by engine.recompute, GiB, as planned": [
            (f"{size / GIB:.3f}", how) for how, size in found["recompute"].items()
        ],
        f"waits of the host for the device in the batch ({moe})": [(str(count), what) for what, count in _waits(found)],
    }


def describe(found: dict[str, Any], gpu_gib: float) -> str:
    peak = step_peak(found)
    batch = f"{found['minibatches']} mini-batches of {found['packs']} packs"
    lines = [
        f"rank {found['rank']} of {found['world']:,}, {batch}, simulated in {found['seconds']:.0f} s "
        f"({found['cpu_seconds']:.0f} s of CPU); nothing ran on a GPU, fragmentation is not in it",
        "",
        f"{'phase':<18} {'peak GiB':>9}",
    ]
    for phase, at in found["peaks"].items():
        if phase in (*BUILD, *STEP):
            bar = "#" * round(BAR * at["bytes"] / peak)
            lines.append(f"{phase:<18} {at['bytes'] / GIB:>9.3f} {bar}")
    for title, rows in tables(found).items():
        lines += ["", title, *(f"{value:>9} {what}" for value, what in rows)]
    verdict = "fits" if peak <= gpu_gib * GIB else "does not fit"
    lines += ["", f"{verdict}: {peak / GIB:.3f} of {gpu_gib:g} GiB"]
    return "\n".join(lines)


def _waits(found: dict[str, Any]) -> list[tuple[str, int]]:
    """Of the step, by place, most first."""
    waits: Counter[str] = Counter()
    for phase, what, _, place, count in found["waits"]:
        if phase in STEP:
            waits[f"{phase}: {what}, {place}"] += count
    return waits.most_common()
