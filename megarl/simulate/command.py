"""`megarl plan --trace`: a rank's step on a simulated GPU, in a process of its own, as tables. Imports no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.config import Config, load_config
from megarl.errors import UserError
from megarl.estimate.memory import GIB, room, verdict
from megarl.simulate.phases import BUILD, STEP

if TYPE_CHECKING:
    from megarl.estimate.cluster import Hosts

BAR = 40  # columns
LARGEST = 10
BACKWARD = 2  # forward passes that a backward pass costs


def run(
    config: str,
    overrides: list[str],
    world: int,
    rank: int,
    rollout_ep: int,
    hosts: Hosts,
    gpu: float,
    as_json: bool,
    out: str | None,
) -> int:
    """0 where the rank fits a GPU of so many bytes, 1 where it does not. out: of the page, or none."""
    from megarl.estimate.cluster import plan_run

    if out is not None:
        from megarl.report.html import refuse_target

        refuse_target(Path(out))
    loaded = load_config(config, overrides)
    stages = plan_run(loaded, world, rollout_ep, hosts)["train"]["stages"]
    request = {"config": config, "keys": overrides, "world": world, "rank": rank}
    found, layers = simulated_ranks([request, {**request, "recompute": True}])
    found["planned"] = stages[rank // (world // len(stages))]
    found["link_bytes"] = link_bytes(found, hosts.gpus)
    found["recompute"] = recompute_gain(loaded, world, rank, layers)
    fits = needed(found) <= room(gpu)
    if out is not None:
        from megarl.simulate.page import write_page

        write_page(Path(out), config, found, tables(found), verdict(needed(found), gpu))
    print(json.dumps(found | {"needed": needed(found), "fits": fits}) if as_json else describe(found, gpu))
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


def needed(found: dict[str, Any]) -> int:
    """Bytes, with what the trace holds none of: messages kept for the next weight sync, and a checkpoint."""
    return max(step_peak(found) + found["planned"]["sync"], found["planned"]["total"])


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


def recompute_gain(config: Config, world: int, rank: int, layers: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By engine.recompute. planned: bytes of a step's peak (megarl/estimate/memory.py). saved: bytes of it that the
    setting spares this rank, flops: that it adds to a pack, share: of what a pack costs without it; these three from a
    trace of single layers (recompute.py).
    """
    from megarl.estimate.cluster import ITEMSIZE, training_of
    from megarl.estimate.memory import RECOMPUTE, held_at_once, layer_kinds, stage_memory
    from megarl.weights.map.layout import Layout
    from megarl.weights.map.weight_map import WeightMap, load_hf_config

    layout = Layout(**config.parallel.model_dump(), world=world)
    weight_map = WeightMap(load_hf_config(config.model.path))
    stage, kept, forward = layout.coord(rank).pp, layers["kept"], layers["forward"]
    name = {True: "moe", False: "dense"}
    held = {name[moe]: count for moe, count in held_at_once(weight_map, layout, stage).items()}
    count: Counter[str] = Counter()
    for chunk in range(layout.vpp):
        count.update({name[moe]: n for moe, n in layer_kinds(weight_map, layout, stage, chunk).items()})
    core = (layers["update"]["selective"] - layers["update"]["none"]) / sum(layers["layers"].values())
    flops = {
        "none": 0,
        "selective": core * count.total(),
        "full": sum(n * forward[kind] for kind, n in count.items()),
    }
    base = training_of(config, layout, ITEMSIZE[config.engine.dtype])
    plans = {how: stage_memory(weight_map, replace(base, recompute=how), stage) for how in RECOMPUTE}
    logits, rest = plans["none"].logits, plans["none"].temporaries
    found = {}
    for how, plan in plans.items():
        saved = sum(n * (kept["none"][kind] - kept[how][kind]) for kind, n in held.items())
        again = max(kept["none"][kind] for kind in held) if how == "full" else 0  # the layer that is computed again
        found[how] = {
            "planned": plan.step,
            "saved": saved + max(logits, rest) - max(logits, rest + again),
            "flops": flops[how],
            "share": flops[how] / max(1, (1 + BACKWARD) * flops["full"]),
        }
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
        "peak by engine.recompute, GiB, as planned; saved and added as a layer of each kind was traced": [
            (
                f"{gain['planned'] / GIB:.3f}",
                f"{how}: {gain['saved'] / GIB:.3f} GiB less, {gain['flops'] / 1e12:,.1f} TFLOP more a pack "
                f"({gain['share']:.0%} of the layers' own)",
            )
            for how, gain in found["recompute"].items()
        ],
        f"waits of the host for the device in the batch ({moe})": [(str(count), what) for what, count in _waits(found)],
    }


def describe(found: dict[str, Any], gpu: float) -> str:
    """gpu: bytes."""
    peak, planned = step_peak(found), found["planned"]
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
    lines += [
        "",
        f"traced: {peak / GIB:.3f} GiB, and {planned['sync'] / GIB:.3f} of messages kept for the next weight sync; "
        f"planned with these: {planned['total'] / GIB:.3f}, of a step or of a checkpoint",
        verdict(needed(found), gpu),
    ]
    return "\n".join(lines)


def _waits(found: dict[str, Any]) -> list[tuple[str, int]]:
    """Of the step, by place, most first."""
    waits: Counter[str] = Counter()
    for phase, what, _, place, count in found["waits"]:
        if phase in STEP:
            waits[f"{phase}: {what}, {place}"] += count
    return waits.most_common()
