"""After a weight sync, does vLLM compute what the trainer computes? For
training layouts against vLLM servers of TP1 and TP2.

    python tools/reshard_table.py [--layouts 1,tp2,...] [--tp 1,2] [--json FILE] [--write FILE] [sync.quantize=int8 ...]

One server of each kind stays up; ranks of one layout after the other connect to it, sync, change every weight and sync
again. A figure is max |log pi - log mu| over the canary's 64 tokens, float32; the limit is 1e-5. After every sync the
digests of the workers' weights are compared with an engine that vLLM loads from an export of the gathered (and
quantised) tensors: a row only exists where they are equal.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.vllm_servers import run_ranks, servers  # noqa: E402

LIMIT = 1e-5
PAGE = """# Weight syncs from every layout

Printed by `python tools/reshard_table.py --write docs/reshard.md` ({count} layouts of real trainer ranks, {how}, float32, gloo) into
running vLLM servers of tensor parallelism 1 and 2; the model is `tools/tiny_model.py`'s Qwen3-MoE. Between the two syncs every weight
changes. A figure is max |log pi - log mu| over 64 tokens, the trainer's log-probability against vLLM's; the limit is 1e-5. After both
syncs the digests of all weights of all vLLM ranks are those of an engine that vLLM loads from an export. Sent / held: bytes that left the
trainers over bytes that the rollout ranks hold. Stages that hold different amounts cannot be evened out by a choice of replicas.

{table}
"""
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


def ranks(work: dict[str, Any]) -> None:
    """Inside torchrun: for every layout and server, two syncs; rank 0 appends a row to work["out"]."""
    import torch
    import torch.distributed as dist

    from megarl.config import load_config
    from megarl.engine.build import build_engine
    from megarl.engine.parallel import destroy_parallel
    from megarl.loop.refit import Refit
    from tools.vllm_servers import join

    for name in work["layouts"]:
        keys = [f"parallel.{key}={value}" for key, value in LAYOUTS[name][1].items()]
        for info in work["workers"]:
            config = load_config(
                None, [f"model.path={work['model']}", f"run.dir={work['folder']}", *keys, *work["overrides"]]
            )
            engine = build_engine(config)
            fleet = join(config, engine, info, work["port"])
            refit = Refit(config, engine, fleet)
            row = {
                "layout": name,
                "transport": config.sync.transport,
                "quantize": config.sync.quantize,
                "tp": info["tp"],
            }
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
                with open(work["out"], "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    destroy_parallel()


def table(
    model: Path, folder: Path, layouts: list[str], port: int, workers: list[dict[str, Any]], overrides: list[str]
) -> list[dict[str, Any]]:
    """Launches the ranks, one launch for each world size; returns the
    rows. Raises CalledProcessError where a sync fails.
    """
    out = folder / f"rows_{len(list(folder.glob('rows_*')))}.jsonl"
    out.touch()
    for world in sorted({LAYOUTS[name][0] for name in layouts}):
        names = [name for name in layouts if LAYOUTS[name][0] == world]
        work = dict(
            layouts=names,
            workers=workers,
            port=port,
            model=str(model),
            folder=str(folder),
            overrides=overrides,
            out=str(out),
        )
        run_ranks(__file__, world, work)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def table_of(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| trainer | ranks | vLLM | first sync | second sync | sent / held | busiest sender / mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sent = row["bytes_sent"]
        even = f"{max(sent) * len(sent) / sum(sent):.3f}" if sum(sent) else "-"
        name = re.sub(r"([a-z]+\d)", r"\1 ", row["layout"]).upper().strip()
        figures = f"{row['first']:.1e} | {row['second']:.1e} | {sum(sent) / row['bytes_held']:.3f} | {even}"
        lines.append(f"| {name if len(sent) > 1 else 'one rank'} | {len(sent)} | TP{row['tp']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--tp", default="1,2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="write the table as markdown")
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
        with servers(model, folder, [int(tp) for tp in args.tp.split(",")], []) as (port, workers):
            rows = table(model, folder, args.layouts.split(","), port, workers, ["sync.digests=every", *args.overrides])
    print(table_of(rows))
    if args.write:
        how = f"{rows[0]['transport']}, quantize {rows[0]['quantize']}"
        args.write.write_text(
            PAGE.format(count=len({row["layout"] for row in rows}), how=how, table=table_of(rows)), encoding="utf-8"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if max(max(row["first"], row["second"]) for row in rows) <= LIMIT else 1)


if __name__ == "__main__":
    main()
