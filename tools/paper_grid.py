"""The paper's experiment in small: MiniRL and its ablations, routing replay and rollout precision, on several seeds.

    python tools/paper_grid.py --subset --out runs/paper_grid          N = 1 and N = 8 under int4, fp32 controls, 3
                                                                       seeds
    python tools/paper_grid.py --full --seeds 3 --only n2- n4-         a part of the full grid
    python tools/paper_grid.py --full --out runs/paper_grid            all of it: about a core-night
    python tools/paper_grid.py --sweep                                 learning rates of the fp32 control
    python tools/paper_grid.py --report --out runs/paper_grid          docs/paper.md, docs/paper/*.svg,
                                                                       docs/paper/results.json
    python tools/paper_grid.py --report                                the same pages from docs/paper/results.json alone

Runs are ordinary run directories under OUT/runs. What has ended is skipped; a killed command goes on where it was. See
examples/paper_grid/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools.grid import arms  # noqa: E402

COLD_START = arms.BASE.with_name("cold_start.yaml")
RESTARTS = 8  # of a lane whose run failed: a fresh server each time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--subset", action="store_true")
    what.add_argument("--full", action="store_true")
    what.add_argument(
        "--sweep",
        type=float,
        nargs="*",
        metavar="LR",
        help=f"learning rates of the fp32 control; {arms.RATES} if none is named",
    )
    what.add_argument("--report", action="store_true")
    what.add_argument("--lane", nargs=3, metavar=("QUEUE", "FOLDER", "DEADLINE"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/paper_grid"))
    parser.add_argument("--seeds", type=int, help="3 for the subset, 5 for the full grid")
    parser.add_argument(
        "--steps",
        type=int,
        default=arms.STEPS,
        help="optimizer steps of a run; the report is of the runs that have them",
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="runs whose name holds one of these, e.g. n2- n4-"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="lanes side by side; each is a trainer and a vLLM server that take turns"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no run after this long; the same command goes on later"
    )
    args = parser.parse_args()
    args.out = args.out.absolute()
    if args.report:
        from tools.grid.page import write_report

        return write_report(args.out, ROOT / "docs", args.steps)
    if args.lane:
        return lane(Path(args.lane[0]), Path(args.lane[1]), args.out, float(args.lane[2]))
    if args.sweep is not None:
        runs = arms.sweep(args.sweep or arms.RATES, args.steps)
    else:
        runs = arms.full(args.seeds or 5, args.steps) if args.full else arms.subset(args.seeds or 3, args.steps)
    runs = [run for run in runs if any(text in run.name for text in args.only)]
    with locked(args.out / "task"):
        make_task(args.out / "task")
    return run_all(runs, args.out, args.jobs, time.time() + 60 * args.minutes)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One command at a time: the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_task(folder: Path) -> None:
    """Prompts, demonstrations, tiny model and the cold starts. What is there is kept."""
    from tools.digit_sum import write_task
    from tools.tiny_model import make_tiny_model

    if not (folder / "demos.jsonl").is_file():
        write_task(folder, digits=arms.DIGITS, train=8192)
    if not (folder / "model" / "config.json").is_file():
        make_tiny_model(folder / "model.partial", layers=3, moe_intermediate=32)
        (folder / "model.partial").rename(folder / "model")
    for name, keys_of_start in arms.COLD_STARTS.items():
        if not (folder / name / "config.json").is_file():
            keys = [
                f"model.path={folder / 'model'}",
                f"sft.data={folder / 'demos.jsonl'}",
                f"sft.out={folder / name}",
                *keys_of_start,
            ]
            command = [
                sys.executable,
                "-m",
                "megarl.cli",
                "sft",
                str(COLD_START),
                *keys,
                f"run.dir={folder / f'sft_{name}'}",
            ]
            subprocess.run(command, check=True, env=environment())


def run_all(runs: list[arms.Run], out: Path, jobs: int, deadline: float) -> int:
    """Lanes side by side until every run has ended or, after `deadline`
    (seconds since 1970), none is begun. 0 if all have ended.

    The kinds of server come one after the other.
    """
    start = time.time()
    todo = [run for run in runs if not arms.ended(out, run)]
    for kind in arms.servers(todo):
        if time.time() > deadline:
            break
        lanes = [out / "lanes" / f"{kind}-{os.getpid()}-{i}" for i in range(jobs)]
        queue = out / f"queue-{kind}-{os.getpid()}.json"
        queue.write_text(json.dumps([asdict(run) for run in todo if run.server == kind]), encoding="utf-8")
        command = [sys.executable, str(ROOT / "tools" / "paper_grid.py"), "--out", str(out), "--lane", str(queue)]
        children = [subprocess.Popen([*command, str(folder), str(deadline)], env=environment()) for folder in lanes]
        for child in children:
            child.wait()
        queue.unlink()
    left = [run.name for run in runs if not arms.ended(out, run)]
    print(
        f"{len(runs) - len(left)} of {len(runs)} runs have ended, {time.time() - start:.0f} s"
        + (f"; first left: {left[0]}" if left else "")
    )
    return 1 if left else 0


def lane(queue: Path, folder: Path, out: Path, deadline: float) -> int:
    """Supervises one lane: starts trainer and server as `megarl run`
    does, with the lane's loop in the place of the trainer's main.
    """
    from megarl.config import load_config
    from megarl.launch.local import launch
    from megarl.launch.processes import make_plan

    first = arms.Run(**{**(item := json.loads(queue.read_text(encoding="utf-8"))[0]), "arm": arms.Arm(**item["arm"])})
    for _ in range(RESTARTS):
        arguments = [str(arms.BASE), *first.overrides(out), "sync.quantize=none", f"run.dir={folder}"]
        plan = make_plan("run", "tools.grid.lane", load_config(arguments[0], arguments[1:]), arguments)
        argv = list(plan.trainer.argv)
        place = argv.index("tools.grid.lane") + 1
        argv[place:place] = [str(queue), str(out), str(deadline)]
        plan = dataclasses.replace(plan, trainer=dataclasses.replace(plan.trainer, argv=argv))
        status = launch(plan)
        if status in (0, 130, 143):  # 128 + SIGINT, SIGTERM
            break
    return status


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


if __name__ == "__main__":
    sys.exit(main())
