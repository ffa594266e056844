"""The paper's experiment in small: MiniRL and its ablations, routing replay and rollout precision, on several seeds.

    python tools/paper_grid.py --subset --out runs/paper_grid          N = 1 and N = 8 under int4, fp32 controls, 3 seeds
    python tools/paper_grid.py --full --out runs/paper_grid            all of it: about a core-night
    python tools/paper_grid.py --sweep                                 learning rates of the fp32 control
    python tools/paper_grid.py --report --out runs/paper_grid          docs/paper.md, docs/paper/*.svg, docs/paper/results.json
    python tools/paper_grid.py --report                                the same pages from docs/paper/results.json alone

Runs are ordinary run directories under OUT/runs. What has ended is skipped; a killed command goes on where it was. See
examples/paper_grid/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools.grid import arms  # noqa: E402

COLD_START = arms.BASE.with_name("cold_start.yaml")
DIGITS = 7  # of a sum; the quickstart has 5: longer sums, so that a run does not saturate
RESTARTS = 8  # of a lane whose run failed: a fresh server each time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--subset", action="store_true")
    what.add_argument("--full", action="store_true")
    what.add_argument(
        "--sweep", type=float, nargs="*", metavar="LR", help=f"learning rates of the fp32 control; {arms.RATES} if none is named"
    )
    what.add_argument("--report", action="store_true")
    what.add_argument("--lane", nargs=2, metavar=("QUEUE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/paper_grid"))
    parser.add_argument("--seeds", type=int, help="3 for the subset, 5 for the full grid")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of a run: {arms.STEPS['subset']} and {arms.STEPS['full']}")
    parser.add_argument("--jobs", type=int, default=2, help="lanes side by side; each is a trainer and a vLLM server that take turns")
    args = parser.parse_args()
    args.out = args.out.absolute()
    if args.report:
        from tools.grid.page import write_report

        return write_report(args.out, ROOT / "docs")
    if args.lane:
        return lane(Path(args.lane[0]), Path(args.lane[1]), args.out)
    size = "full" if args.full else "subset"
    steps = args.steps or arms.STEPS[size]
    seeds = args.seeds or (5 if args.full else 3)
    runs = arms.sweep(args.sweep or arms.RATES, steps) if args.sweep is not None else getattr(arms, size)(seeds, steps)
    make_task(args.out / "task")
    return run_all(runs, args.out, args.jobs)


def make_task(folder: Path) -> None:
    """Prompts, demonstrations, tiny model and the cold start that all runs share. What is there is kept."""
    from tools.digit_sum import write_task
    from tools.tiny_model import make_tiny_model

    if not (folder / "demos.jsonl").is_file():
        write_task(folder, digits=DIGITS, train=8192)
    if not (folder / "model" / "config.json").is_file():
        make_tiny_model(folder / "model.partial", layers=3, moe_intermediate=32)
        (folder / "model.partial").rename(folder / "model")
    if not (folder / "cold" / "config.json").is_file():
        keys = [f"model.path={folder / 'model'}", f"sft.data={folder / 'demos.jsonl'}", f"sft.out={folder / 'cold'}"]
        command = [sys.executable, "-m", "megarl.cli", "sft", str(COLD_START), *keys, f"run.dir={folder / 'sft'}"]
        subprocess.run(command, check=True, env=environment())


def run_all(runs: list[arms.Run], out: Path, jobs: int) -> int:
    """Lanes side by side until every run has ended. The kinds of server come one after the other."""
    start, status = time.time(), 0
    for kind in arms.servers(runs):
        queue = out / f"queue-{kind}.json"
        queue.write_text(json.dumps([asdict(run) for run in runs if run.server == kind]))
        lanes = [(out / "lanes" / f"{kind}-{i}") for i in range(jobs)]
        command = [sys.executable, str(ROOT / "tools" / "paper_grid.py"), "--out", str(out), "--lane", str(queue)]
        children = [subprocess.Popen([*command, str(folder)], env=environment()) for folder in lanes]
        status = max([status, *(child.wait() for child in children)])
    left = [run.name for run in runs if not arms.ended(out, run)]
    print(
        f"{len(runs) - len(left)} of {len(runs)} runs have ended, {time.time() - start:.0f} s"
        + (f"; first left: {left[0]}" if left else "")
    )
    return 1 if left else 0


def lane(queue: Path, folder: Path, out: Path) -> int:
    """Supervises one lane: starts trainer and server as `megarl run` does, with the lane's loop in the place of the trainer's main."""
    from megarl.config import load_config
    from megarl.launch.local import launch
    from megarl.launch.plan import MODULES, make_plan

    first = arms.Run(**{**(item := json.loads(queue.read_text())[0]), "arm": arms.Arm(**item["arm"])})
    for _ in range(RESTARTS):
        arguments = [str(arms.BASE), *first.overrides(out), "sync.quantize=none", f"run.dir={folder}"]
        plan = make_plan("run", load_config(arguments[0], arguments[1:]), arguments)
        argv = list(plan.trainer.argv)
        at = argv.index(MODULES["run"])
        argv[at : at + 1] = ["tools.grid.lane", str(queue), str(out)]
        plan = dataclasses.replace(plan, trainer=dataclasses.replace(plan.trainer, argv=argv))
        status = launch(plan, load_config(arguments[0], arguments[1:]))
        if status == 0:
            return status
    return status


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


if __name__ == "__main__":
    sys.exit(main())
