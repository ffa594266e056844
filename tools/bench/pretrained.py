"""What examples/pretrained does: the mismatch of both engines before training, and rewards over whole runs.

    python tools/bench/pretrained.py DIR [--only compare|run] [--models dense,moe] [--seeds 0,1,2] [--json FILE]
        [key=value ...]

DIR holds what make_model.py and arithmetic.py have written (examples/pretrained/README.md). The runs stay in DIR/bench:
the same command again goes on where one was cut.

compare: `megarl compare` on each model, with rollouts in float32 and in bfloat16, the mixture with its routes replayed
(R3) and its own. run: `megarl run` of examples/pretrained/sums.yaml for each seed; rewards are means of the first and
the last eighth of its steps, held out is the greedy answer's reward after the run, seconds a step are the median.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megarl.observe.metrics import read_metrics  # noqa: E402

CONFIG = ROOT / "examples" / "pretrained" / "sums.yaml"
MODELS = {"dense": ["replay.mode=none"], "moe": ["replay.mode=R3", "parallel.ep=2"]}


def megarl(command: str, models: Path, model: str, run_dir: Path, *more: str) -> None:
    """Its errors are shown where it fails."""
    keys = [f"model.path={models / model}", f"data.prompts={models / 'sums.jsonl'}", f"run.dir={run_dir}"]
    keys += [*MODELS[model], *more]
    done = subprocess.run(
        [sys.executable, "-m", "megarl", command, str(CONFIG), *keys], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}{done.stderr[-4000:]}\npretrained: error: megarl {command} {' '.join(keys)}")


def compare(models: Path, model: str, folder: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Replayed and not are two passes of one command, over the same responses."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        where = folder / f"compare_{model}_{dtype}"
        shutil.rmtree(where, ignore_errors=True)
        megarl("compare", models, model, where, f"rollout.dtype={dtype}", *overrides)
        (file,) = where.rglob("compare.json")
        report = json.loads(file.read_text(encoding="utf-8"))
        for way in ("live", "replayed"):
            if report[way]:
                k3 = report[way]["mismatch/kl_k3"]
                rows.append({"model": model, "rollout": dtype, "routes": way, "tokens": report["tokens"], "k3": k3})
                print(f"compare {model:6}rollout {dtype:10}routes {way:10}k3 {k3:.2e}", flush=True)
    return rows


def run(models: Path, model: str, seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    where = folder / "_".join([f"run_{model}_{seed}", *(key.replace("/", "-") for key in overrides)])
    keys = [f"eval.prompts={models / 'held_out.jsonl'}", f"run.seed={seed}", *overrides]
    megarl("run", models, model, where, *keys)
    rows = read_metrics(where)
    rewards = [row["reward/mean"] for row in rows]
    eighth = max(len(rewards) // 8, 1)
    first, last = statistics.mean(rewards[:eighth]), statistics.mean(rewards[-eighth:])
    held = rows[-1]["eval/mean_at_k"]
    seconds = statistics.median(row["time/step_s"] for row in rows)
    k3 = statistics.median(row["mismatch/kl_k3"] for row in rows if "mismatch/kl_k3" in row)  # of steps that learnt
    print(
        f"run {model:6} seed {seed}: reward {first:.3f} -> {last:.3f}, held out {held:.3f}, "
        f"{seconds:.1f} s a step, k3 {k3:.1e}",
        flush=True,
    )
    return {"model": model, "seed": seed, "first": first, "last": last, "held_out": held, "step_s": seconds, "k3": k3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", choices=("compare", "run"))
    parser.add_argument("--models", default="dense,moe")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if unknown := set(args.models.split(",")) - set(MODELS):
        parser.error(f"--models has no {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    figures: dict[str, list[dict[str, Any]]] = {"compare": [], "run": []}
    models = args.folder.resolve()
    runs = models / "bench"
    for model in args.models.split(","):
        if args.only != "run":
            figures["compare"] += compare(models, model, runs, args.overrides)
        if args.only != "compare":
            figures["run"] += [run(models, model, int(seed), runs, args.overrides) for seed in args.seeds.split(",")]
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
