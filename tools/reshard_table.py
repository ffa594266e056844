"""After a weight sync, does vLLM compute what the trainer computes? For training layouts against vLLM servers of TP1 and TP2.

    python tools/reshard_table.py [--layouts 1,tp2,...] [--tp 1,2] [--json FILE] [sync.transport=broadcast sync.quantize=int8 ...]

One server of each kind stays up; ranks of one layout after the other connect to it, sync, change every weight and sync again. A figure is
max |log pi - log mu| over the canary's 64 tokens, float32; the limit is 1e-5. After every sync the digests of the workers' weights are
compared with an engine that vLLM loads from an export of the gathered (and quantised) tensors: a row only exists where they are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LIMIT = 1e-5
START_S = 900  # limit for a server's start on two very busy cores
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {  # name -> (ranks, parallel.*)
    "1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2etp2": (2, {"tp": 2, "etp": 2}),
    "pp2vpp2": (2, {"pp": 2, "vpp": 2}),
    "dp2": (2, {}),
    "dp4ep2": (4, {"ep": 2}),
    "ep4": (4, {"ep": 4}),
    "tp2cp2": (4, {"tp": 2, "cp": 2}),
    "tp2pp2ep2": (4, {"tp": 2, "pp": 2, "ep": 2}),
    "tp2pp2etp2": (4, {"tp": 2, "pp": 2, "etp": 2}),
    "pp2vpp2ep2": (4, {"pp": 2, "vpp": 2, "ep": 2}),
    "pp4": (4, {"pp": 4}),
}


@contextlib.contextmanager
def servers(model: Path, folder: Path, tps: list[int], overrides: list[str]) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """One vLLM server of each tensor-parallel size: (the run's store, of which this process is the master; the servers' WorkerInfo)."""
    from dataclasses import asdict

    from megarl.rollout import coordinator

    store = coordinator.open_store("127.0.0.1", 0, is_master=True, timeout_s=60)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    children = []
    config = folder / "servers.yaml"
    config.write_text("")
    for tp in tps:
        keys = [f"model.path={model}", f"run.dir={folder / f'server_tp{tp}'}", f"rollout.tp={tp}", f"launch.store=127.0.0.1:{store.port}"]
        keys += ["rollout.max_prompt_tokens=96", "rollout.max_new_tokens=16", f"rollout.start_timeout_s={START_S}", *overrides]
        children.append(subprocess.Popen([sys.executable, "-m", "megarl.cli", "rollout", str(config), *keys], cwd=ROOT, env=env))
    try:
        workers = coordinator.wait_for_workers(store, len(tps), START_S)
        yield store, [{k: v for k, v in asdict(worker).items() if k not in ("beat", "seen_at")} for worker in workers]
        coordinator.request_shutdown(store, workers)
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait(30)


def ranks(work: dict[str, Any]) -> None:
    """Inside torchrun: for every layout and server, two syncs; rank 0 appends a row to work["out"]."""
    import torch
    import torch.distributed as dist

    from megarl.config import load_config
    from megarl.engine.build import build_engine
    from megarl.engine.parallel import destroy_parallel
    from megarl.refit import Refit
    from megarl.rollout.coordinator import WorkerInfo
    from megarl.rollout.fleet import JoinedFleet

    for name in work["layouts"]:
        keys = [f"parallel.{key}={value}" for key, value in LAYOUTS[name][1].items()]
        for info in work["workers"]:
            worker = WorkerInfo(**info)
            config = load_config(None, [f"model.path={work['model']}", f"run.dir={work['folder']}", *keys, *work["overrides"]])
            config.launch.store = f"127.0.0.1:{work['port']}"
            engine = build_engine(config)
            fleet = JoinedFleet(config, engine.model.parallel.device.device, [worker])
            refit = Refit(config, engine, fleet)
            row = {"layout": name, "transport": config.sync.transport, "quantize": config.sync.quantize, "tp": worker.tp}
            for sync in ("first", "second"):
                values = refit.sync(1)
                row |= {sync: values["sync/canary_max_diff"], f"{sync}_s": values["time/sync_s"]}
                with torch.no_grad():
                    for _, tensor in engine.model.params():
                        tensor.add_(0.02 * torch.sin(40 * tensor))  # the same in every layout
            sent = torch.tensor(float(getattr(refit.outgoing, "sent", 0)), dtype=torch.float64)
            everyone = [torch.zeros_like(sent) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, sent)
            fleet.close()
            if dist.get_rank() == 0:
                row |= {"bytes_sent": [float(each) for each in everyone], "bytes_held": refit.outgoing.bytes}
                with open(work["out"], "a") as file:
                    file.write(json.dumps(row) + "\n")
    destroy_parallel()


def table(
    model: Path, folder: Path, layouts: list[str], port: int, workers: list[dict[str, Any]], overrides: list[str]
) -> list[dict[str, Any]]:
    """Launches the ranks, one launch for each world size; prints and returns the rows. Raises CalledProcessError where a sync fails."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    out = folder / f"rows_{len(list(folder.glob('rows_*')))}.jsonl"
    out.touch()
    for world in sorted({LAYOUTS[name][0] for name in layouts}):
        mine = [name for name in layouts if LAYOUTS[name][0] == world]
        work = dict(layouts=mine, workers=workers, port=port, model=str(model), folder=str(folder), overrides=overrides, out=str(out))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", __file__]
        subprocess.run([*command, "--ranks", json.dumps(work)], env=env, cwd=ROOT, check=True)
    return [json.loads(line) for line in out.read_text().splitlines()]


def show(rows: list[dict[str, Any]]) -> None:
    columns = {"vLLM": 6, "transport": 11, "quantize": 10, "first sync": 12, "second sync": 13, "sent/held": 11, "max/mean sent": 15}
    print(f"{'layout':14}" + "".join(f"{column:>{width}}" for column, width in columns.items()))
    for row in rows:
        sent = row["bytes_sent"]
        ratio = sum(sent) / row["bytes_held"]
        even = max(sent) * len(sent) / sum(sent) if sum(sent) else float("nan")
        print(
            f"{row['layout']:14}{'TP' + str(row['tp']):>6}{row['transport']:>11}{row['quantize']:>10}"
            f"{row['first']:12.1e}{row['second']:13.1e}{ratio:11.3f}{even:15.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--tp", default="1,2")
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
        model = make_tiny_model(folder / "model")
        with servers(model, folder, [int(tp) for tp in args.tp.split(",")], []) as (store, workers):
            rows = table(model, folder, args.layouts.split(","), store.port, workers, ["sync.digests=every", *args.overrides])
    show(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if max(max(row["first"], row["second"]) for row in rows) <= LIMIT else 1)


if __name__ == "__main__":
    main()
