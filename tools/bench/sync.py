"""Seconds of a weight sync by each of its ways, beside one memory copy
of the same bytes. Prints a table; --json FILE writes the figures.

    python tools/bench/sync.py [--rounds 5] [--layers 8] [--json FILE] [key=value ...]

A Qwen3-MoE of about 200M parameters in bfloat16 (8 layers, hidden 512, 32 experts), 4 trainer
ranks (TP2 PP2 EP2), one vLLM server of TP2: 2 rollout ranks. A sync is timed from its start
until the servers serve the new version, without the canary. Medians; reshard, broadcast and
disk (export to a folder, vLLM's reload_weights) take turns in one run of the same processes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.vllm_servers import run_ranks, servers  # noqa: E402

WORLD = 4
LAYOUT = ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"]
WAYS = ("reshard", "broadcast", "disk")
TURNS = 2  # each way's rounds are split over so many turns


def ranks(work: dict[str, Any]) -> None:
    """Inside torchrun; rank 0 writes work["out"]: for every way a list
    of {total, receive, load} seconds, and what was moved.
    """
    import torch.distributed as dist

    from megarl.config import load_config
    from megarl.engine.build import build_engine
    from megarl.engine.export import export_hf
    from megarl.engine.parallel import destroy_parallel
    from megarl.loop.refit import Refit
    from megarl.rollout.client import Server
    from tools.vllm_servers import join

    keys = [
        f"model.path={work['model']}",
        f"run.dir={work['folder']}",
        "engine.dtype=bfloat16",
        "sync.digests=off",
        *LAYOUT,
    ]
    config = load_config(None, [*keys, *work["overrides"]])
    engine = build_engine(config)
    model = engine.model
    (worker,) = work["workers"]
    times: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    figures: dict[str, Any] = {}
    for way in WAYS * TURNS:
        if way == "disk":
            export = Path(work["folder"]) / "export"
            for _ in range(work["rounds"] // TURNS):
                if model.parallel.is_main:
                    shutil.rmtree(export, ignore_errors=True)
                dist.barrier()
                start = time.perf_counter()
                export_hf(model, work["model"], export, model.config.params_dtype)
                saved = time.perf_counter()
                if model.parallel.is_main:
                    body = {"method": "reload_weights", "kwargs": {"weights_path": str(export)}}
                    Server(worker["url"], 300, worker["tokens"]["control"]).post("/collective_rpc", body)
                dist.barrier()
                times[way].append({"total": time.perf_counter() - start, "save": saved - start})
            continue
        config.sync.transport = way  # type: ignore[assignment]
        fleet = join(config, engine, worker, work["port"])
        refit = Refit(config, engine, fleet)
        refit.sync(1)  # warm: buffers, and the canary once
        for _ in range(work["rounds"] // TURNS):
            dist.barrier()
            start = time.perf_counter()
            fleet.push(refit.outgoing.buckets(model.params()), [])
            fleet.loaded()
            fleet.commit(1)
            dist.barrier()
            times[way].append({"total": time.perf_counter() - start, **fleet.push_seconds})
        fleet.close()
        sent = [0] * WORLD
        dist.all_gather_object(sent, getattr(refit.outgoing, "sent", 0))
        figures[way] = {"sent": sent, "held": refit.outgoing.bytes}
    if model.parallel.is_main:
        Path(work["out"]).write_text(json.dumps({"times": times, "figures": figures}), encoding="utf-8")
    destroy_parallel()


def memory_copy(nbytes: int, rounds: int) -> float:
    """Seconds to copy so many bytes once, one thread, warm."""
    import torch

    torch.set_num_threads(1)
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ranks", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if args.ranks:
        ranks(json.loads(args.ranks))
        return
    from tools.tiny_model import make_tiny_model

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shape = dict(
            layers=args.layers, hidden=512, experts=32, top_k=4, moe_intermediate=512, heads=8, kv_heads=4, head_dim=64
        )
        model = make_tiny_model(folder / "model", **shape, dtype="bfloat16", initializer_range=0.02)
        with servers(model, folder, [2], ["rollout.dtype=bfloat16", "sync.timeout_s=300"]) as (port, workers):
            overrides = ["sync.timeout_s=300", "rollout.dtype=bfloat16", *args.overrides]
            work = dict(
                workers=workers,
                port=port,
                model=str(model),
                folder=str(folder),
                rounds=args.rounds,
                overrides=overrides,
            )
            work["out"] = str(folder / "times.json")
            run_ranks(__file__, WORLD, work)
            measured = json.loads((folder / "times.json").read_text(encoding="utf-8"))
    report(measured, args)


def report(measured: dict[str, Any], args: argparse.Namespace) -> None:
    held_bytes, sent = measured["figures"]["reshard"]["held"], measured["figures"]["reshard"]["sent"]
    copy = memory_copy(held_bytes, args.rounds)
    medians = {
        way: {part: statistics.median(row[part] for row in rows) for part in rows[0]}
        for way, rows in measured["times"].items()
    }
    print(
        f"{held_bytes / 2**20:.0f} MiB held by 2 rollout ranks; one memory copy of them takes {copy:.3f} s; medians of "
        f"{args.rounds}"
    )
    print(
        f"reshard: sent / held {sum(sent) / held_bytes:.4f}, largest sender / mean {max(sent) * WORLD / sum(sent):.4f}"
    )
    print(f"{'':12}{'seconds':>9}{'of copy':>9}{'of broadcast':>14}   parts")
    for way, parts in medians.items():
        detail = ", ".join(f"{name} {value:.3f}" for name, value in parts.items() if name != "total")
        ratio = parts["total"] / medians["broadcast"]["total"]
        print(f"{way:12}{parts['total']:9.3f}{parts['total'] / copy:9.1f}{ratio:14.3f}   {detail}")
    if args.json:
        args.json.write_text(
            json.dumps({"copy_s": copy, "held_bytes": held_bytes, "sent_bytes": sent, "median_s": medians}, indent=1)
            + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
