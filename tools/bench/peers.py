"""Seconds a step of megarl beside what one would pick instead, on the same work, in the same minutes.

    python tools/bench/peers.py [--rounds 3] [--steps 24] [--sides megarl,engines,one-off,trl,trl-mu,plain]
        [--env DIR] [--json FILE]

The work is that of tools/bench/step.py, on two trainer ranks where nothing else is said. Sides, which take turns in
every round (without --sides megarl, one-off, trl and plain: three rounds take some ten minutes):

    megarl    lock-step, R3, every check on
    engines   megarl with a vLLM server for each trainer rank (rollout.engines=2)
    one-off   megarl one step off (rollout.max_lag=1): a trainer rank beside a server, each on a core of its own
    trl       TRL's GRPOTrainer, two ranks, vLLM colocated: an engine in each rank
    trl-mu    TRL with its default, the update corrected by the engine's log-probabilities
    plain     a loop by hand over transformers and vLLM, an engine in each rank (tools/bench/peers_sides.py)

TRL has an environment of its own, made on the first call (--env; the default lies in the user's cache): TRL and
accelerate as pinned below, on top of this environment's torch, transformers and vLLM, which are shared. Prints means
over the steps after a warm-up of 3 (one step off, short and long ones take turns), round by round, medians over the
rounds, and ratios, of median steps too. CPU is seconds of a core a step, of all processes of a side together, as /proc
has them. Over the cores of the machine it is what a step would take if none of them ever waited. OFF is the largest
difference of the engine's and the trainer's log-probabilities in a step where a side compares them: what its weight
sync is worth.
vLLM's CPU build packs weights when it loads them, and TRL's in-place update fails there: its sync is vLLM's own reload
here, with the repairs of megarl's vLLM plugin. All engines run eagerly, one thread each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import cast

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megarl.launch.malloc import huge_pages  # noqa: E402
from megarl.observe.metrics import METRICS_FILE, read_metrics  # noqa: E402
from megarl.observe.trace import read_trace  # noqa: E402
from tools.bench.cpu_seconds import CpuWatch, a_step  # noqa: E402
from tools.bench.step import WARM_UP, configuration  # noqa: E402
from tools.digit_sum import write_task  # noqa: E402
from tools.tiny_model import make_tiny_model  # noqa: E402

PINS = ("trl==1.16.0", "accelerate==1.15.0")
OURS = ("megarl", "engines", "one-off")
SIDES = (*OURS, "trl", "trl-mu", "plain")
PARTS = ("rollout", "sync", "update", "step")
LACKS = {
    "megarl": "nothing: routes replayed (R3), mu in the objective, checksums, digests, canary, finite gradients",
    "engines": "the same",
    "one-off": "the same, with rollouts one step old, on one trainer rank",
    "trl": "no mu in the objective, no replay of routes, no check of what the engine holds, answers or gradients",
    "trl-mu": "no replay of routes, no check of what the engine holds; mu from a second forward pass",
    "plain": "no replay of routes, no checks, no recovery, no metrics; mu in the objective",
}
Figures = dict[str, float]


def trl_python(folder: Path) -> Path:
    """The interpreter of the environment in `folder`, which is made where it is not whole."""
    shared = sysconfig.get_paths()["purelib"]
    key = hashlib.sha256(" ".join((*PINS, shared, sys.version)).encode()).hexdigest()[:16]
    python, stamp = folder / "bin" / "python", folder / "megarl-peers"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return python
    print(f"making an environment for TRL in {folder}: {', '.join(PINS)}, the rest shared", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    Path(own, "shared.pth").write_text(f"{shared}\n", encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*install, *PINS], check=True)
    stamp.write_text(key, encoding="utf-8")
    return python


def means(rows: list[Figures]) -> Figures:
    rows = rows[WARM_UP:]
    figures = {part: statistics.mean(row[part] for row in rows) for part in PARTS}
    figures["median step"] = statistics.median(row["step"] for row in rows)
    off = [row["off"] for row in rows if "off" in row]
    return figures | ({"off": max(off)} if off else {})


def run_megarl(folder: Path, side: str, steps: int, number: int) -> Figures:
    config = configuration(folder, "1" if side == "one-off" else "dp2", WARM_UP + steps)
    config["run"]["dir"] = str(folder / f"{side}_{number}")
    config["rollout"] |= {"max_lag": int(side == "one-off"), "engines": 1 + (side == "engines")}
    path = folder / f"{side}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "megarl.cli", "run", str(path)]
    with CpuWatch(Path(config["run"]["dir"]) / METRICS_FILE) as watch:
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    taken = read_metrics(config["run"]["dir"])
    rows = [{part: row[f"time/{part}_s"] for part in PARTS} | {"off": row["sync/canary_max_diff"]} for row in taken]
    # from sync to sync, as the other sides count: time/step_s ends before its own figures are written
    syncs = [cast(float, event["ts"]) / 1e6 for event in read_trace(config["run"]["dir"]) if event["name"] == "sync"]
    for row, (began, after) in zip(rows, pairwise(syncs), strict=True):
        row["step"] = after - began
    return means(rows) | {"cpu": a_step(watch.samples, WARM_UP)}


def run_other(folder: Path, side: str, steps: int, python: Path) -> Figures:
    """A side of peers_sides.py, in two ranks. Its output is shown where it fails."""
    ours = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # 20 s at the start for a few helpers, as in our servers
        "HF_HUB_OFFLINE": "1",
        **huge_pages(),
    }
    out = folder / f"{side}.jsonl"
    out.unlink(missing_ok=True)  # of the round before
    command = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tools" / "bench" / "peers_sides.py"), side, str(folder / "model")]
    command += [str(folder / "data" / "train.jsonl"), str(WARM_UP + steps), str(out)]
    ours["PYTHONPATH"] = str(ROOT)  # for megarl's plugin, which repairs the reload of vLLM's CPU build in every process
    environment = os.environ | ours
    with CpuWatch(out) as watch:
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{(done.stdout + done.stderr)[-4000:]}\npeers: error: {side} ended with status {done.returncode}")
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return means(rows) | {"cpu": a_step(watch.samples, WARM_UP)}


def shown(figures: Figures) -> str:
    off = f"{figures['off']:12.1e}" if "off" in figures else f"{'-':>12}"
    return "".join(f"{figures[column]:10.3f}" for column in (*PARTS, "cpu")) + off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--sides", default="megarl,one-off,trl,plain")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--env", type=Path, default=cache / "megarl" / "peers")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sides = args.sides.split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"--sides has no {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    trl = trl_python(args.env.resolve()) if any(side.startswith("trl") for side in sides) else None
    taken: dict[str, list[Figures]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_tiny_model(folder / "model")
        write_task(folder / "data", digits=7)
        columns = "".join(f"{column:>10}" for column in (*PARTS, "CPU"))
        print(f"{'':16}{columns}{'OFF':>12}    (mean seconds of {args.steps})")
        for number in range(args.rounds):
            for side in sides:
                if side in OURS:
                    figures = run_megarl(folder, side, args.steps, number)
                else:
                    figures = run_other(
                        folder, side, args.steps, trl if side != "plain" and trl else Path(sys.executable)
                    )
                taken[side].append(figures)
                print(f"round {number + 1} {side:8}{shown(figures)}", flush=True)
    middle = {
        side: {key: statistics.median(round_[key] for round_ in rounds) for key in rounds[0]}
        for side, rounds in taken.items()
    }
    for side in sides:
        print(f"{'median':8}{side:8}{shown(middle[side])}   lacks {LACKS[side]}")
    ratios = {
        of: {
            f"{ours}/{other}": statistics.median(a[of] / b[of] for a, b in zip(taken[ours], taken[other], strict=True))
            for ours in OURS
            for other in sides
            if ours in taken and other not in OURS
        }
        for of in ("step", "median step")
    }
    for of, said in (("step", "mean steps"), ("median step", "median steps")):
        shown_ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios[of].items())
        print(f"{shown_ratios}    (median of the rounds' ratios of {said})")
    if args.json:
        result = {"steps": args.steps, "warm_up": WARM_UP, "rounds": taken, "medians": middle, "ratios": ratios}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
