"""Seconds a step, and where they go, for one fixed piece of work in
several layouts. Prints a table; --json FILE writes the figures.

    python tools/bench/step.py [--steps 20] [--layouts 1,dp2,dp2-n2,tp2pp2ep2] [--json FILE] [key=value ...]

The work: a Qwen3-MoE of 0.5M parameters (4 layers, hidden 64, 8 experts top-2, vocabulary 32, float32), 16 prompts of 8
tokens, 8 responses each of at most 16 tokens, one update (two in dp2-n2), R3 on, every check on. With one update (N =
1) pi_old is the update's own log-probability (docs/objective.md); dp2-n2 splits the same responses over two updates, so
it pays for a pi_old pass and a second optimizer step. Medians over --steps steps after 3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megarl.observe.metrics import read_metrics  # noqa: E402
from tools.digit_sum import write_task  # noqa: E402
from tools.tiny_model import make_tiny_model  # noqa: E402

LAYOUTS = {
    "1": dict(trainers=1),
    "dp2": dict(trainers=2),
    "dp2-n2": dict(trainers=2, minibatches=2),
    "tp2pp2ep2": dict(trainers=4, tp=2, pp=2, ep=2),
}
WARM_UP = 3
PARTS = ("rollout", "old_logprob", "update", "sync", "step")


def configuration(folder: Path, name: str, steps: int) -> dict[str, Any]:
    """The work in one layout; model/ and data/ lie in `folder`, and so does run.dir."""
    layout = dict(LAYOUTS[name])
    return {
        "model": {"path": str(folder / "model")},
        "data": {"prompts": str(folder / "data" / "train.jsonl"), "reward": "digit_sum"},
        "batch": {"prompts": 16, "group": 8, "minibatches": layout.pop("minibatches", 1)},
        "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 16},
        "replay": {"mode": "R3"},
        "train": {"steps": steps, "lr": 1e-4},
        "launch": {"trainers": layout.pop("trainers")},
        "parallel": layout,
        "run": {"dir": str(folder / f"run_{name}")},
    }


def measure(folder: Path, name: str, steps: int, overrides: list[str]) -> dict[str, float]:
    """Medians over the steps after the warm-up, in seconds; tokens_per_s counts response tokens over the whole step."""
    config = configuration(folder, name, WARM_UP + steps)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "megarl.cli", "run", str(path), *overrides],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    rows = read_metrics(config["run"]["dir"])[WARM_UP:]
    result = {part: statistics.median(row[f"time/{part}_s"] for row in rows) for part in PARTS}
    result["tokens_per_s"] = statistics.median(row["throughput/tokens_per_s"] for row in rows)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_tiny_model(folder / "model")
        write_task(folder / "data", digits=7)
        print(
            f"{'layout':12}"
            + "".join(f"{part:>13}" for part in PARTS)
            + f"{'tokens/s':>13}    (seconds, median of {args.steps})"
        )
        for name in args.layouts.split(","):
            results[name] = measure(folder, name, args.steps, args.overrides)
            row = "".join(f"{results[name][part]:13.3f}" for part in PARTS)
            print(f"{name:12}{row}{results[name]['tokens_per_s']:13.0f}", flush=True)
    if args.json:
        args.json.write_text(
            json.dumps({"steps": args.steps, "warm_up": WARM_UP, "median_s": results}, indent=1) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
