"""Lock-step against one step off (rollout.max_lag = one batch): seconds a step, idle share of either side, reward.

    python tools/bench/async.py [--work quickstart,tail,in-flight] [--steps 30] [--rounds 3] [--seeds 0] [--json FILE]
        [--folder DIR]

Both take turns in every round, on the same weights and prompts. quickstart: the work of examples/quickstart.yaml on one
trainer rank. tail: 16 prompts x 8 responses whose lengths are log-normal, the longest about 20 times the median
(tools/bench/tail_task.py). A step's time is the mean over the steps after a warm-up of 3: a tail is what one step in
some waits for. Medians over the rounds. idle: the trainer's share of a step spent waiting for rollouts, and the
servers' share without anything to sample. cpu: seconds of a core a step, by process, and of all; where they add up to
two a second, two cores have no more to give. First printed is how much slower two busy processes are than one: virtual
cores may be halves of one. in-flight: the k3 of tokens sampled after an update in the middle of their
response, against the trainer with the same weights, float32: keys and values recomputed, and kept; with routes replayed
(R3) and without. --seeds N: trains the quickstart for its 100 steps with N seeds each, and compares the reward of the
last ten. With --folder, the same command goes on where it has ended: runs that are done are not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megarl.observe.metrics import read_metrics  # noqa: E402
from tools.bench.tail_task import LONGEST, write_tail_task  # noqa: E402
from tools.digit_sum import write_task  # noqa: E402
from tools.tiny_model import make_tiny_model  # noqa: E402

WARM_UP = 3
SIDES = ("lock-step", "one step off")
QUICKSTART = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8"))
COLD = yaml.safe_load((ROOT / "examples" / "cold_start.yaml").read_text(encoding="utf-8"))


def megarl(*arguments: str) -> None:
    command = [sys.executable, "-m", "megarl", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


CPU = {"trainer": "megarl.launch.rank", "engine": "VLLM::EngineCore", "api_server": "vllm.entrypoints"}


BUSY = """
import sys, time, torch
torch.set_num_threads(1)
a = torch.randn(64, 64)
print("ready", flush=True)
sys.stdin.readline()
start = time.perf_counter()
for _ in range(200_000):
    a @ a
print(time.perf_counter() - start)
"""


def slowdown() -> float:
    """Seconds that each of two busy processes takes over those of one alone."""

    def seconds(count: int) -> float:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        busy = [subprocess.Popen([sys.executable, "-c", BUSY], **pipes) for _ in range(count)]
        for one in busy:
            assert one.stdout is not None and one.stdout.readline() == "ready\n"
        for one in busy:
            assert one.stdin is not None
            one.stdin.write("\n"), one.stdin.flush()
        return statistics.fmean(float(one.communicate()[0]) for one in busy)

    return seconds(2) / seconds(1)


def run_and_weigh(config: str, run_dir: Path) -> None:
    """`megarl run`. CPU seconds a step by process, from the warm-up to the last step, go to run_dir/cpu.json."""
    command = [sys.executable, "-m", "megarl", "run", config]
    first: tuple[int, dict[str, float]] | None = None
    last = WARM_UP - 1
    found: dict[str, list[psutil.Process]] = {}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as popen:
        while popen.poll() is None:
            time.sleep(0.5)
            steps = _lines(run_dir / "metrics.jsonl")
            if steps <= last:
                continue
            last = steps
            with contextlib.suppress(psutil.Error):
                found = found or _processes(popen.pid)
                spent = {kind: sum(sum(one.cpu_times()[:2]) for one in found[kind]) for kind in CPU}
                first = first or (steps, spent)
                if steps > first[0]:
                    a_step = {kind: (spent[kind] - first[1][kind]) / (steps - first[0]) for kind in CPU}
                    (run_dir / "cpu.json").write_text(json.dumps(a_step), encoding="utf-8")
    if popen.returncode:
        raise SystemExit(f"megarl run {config} ended with status {popen.returncode}")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _processes(pid: int) -> dict[str, list[psutil.Process]]:
    below = [(child, " ".join(child.cmdline())) for child in psutil.Process(pid).children(recursive=True)]
    return {kind: [child for child, command in below if word in command] for kind, word in CPU.items()}


def written(path: Path, config: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def prepare(folder: Path, work: str, sft_steps: int) -> dict[str, Any]:
    """Model, data and cold start of a work in `folder`; its configuration, still without steps and a run.dir."""
    longest = LONGEST if work == "tail" else 9
    make_tiny_model(folder / "model")
    write_tail_task(folder) if work == "tail" else write_task(folder)
    rollout = {"max_prompt_tokens": 8, "max_new_tokens": longest}
    cold = COLD | {"model": {"path": str(folder / "model")}, "launch": {"trainers": 1}, "rollout": rollout}
    cold["sft"] = {"data": str(folder / "demos.jsonl"), "out": str(folder / "cold"), "batch": 64}
    cold["train"] = COLD["train"] | {"steps": sft_steps}
    cold["run"] = {"dir": str(folder / "sft")}
    if not (folder / "cold").exists():
        megarl("sft", written(folder / "sft.yaml", cold))
    config: dict[str, Any] = {
        "model": {"path": str(folder / "cold")},
        "launch": {"trainers": 1},
        "replay": QUICKSTART["replay"],
        "objective": QUICKSTART["objective"],
        "batch": QUICKSTART["batch"],
        "rollout": rollout,
        "data": {"prompts": str(folder / "train.jsonl"), "reward": "digit_sum"},
        "train": QUICKSTART["train"],
    }
    if work == "tail":
        config["data"]["reward"] = "tools.bench.tail_task.parity"
        config["train"] = config["train"] | {"lr": 1e-6, "min_lr": 0.0}  # lengths stay what they are
    return config


def rows_of(folder: Path, config: dict[str, Any], side: str, name: str, steps: int, seed: int) -> list[dict[str, Any]]:
    run_dir = folder / name
    run = {"dir": str(run_dir), "seed": seed, "rollout_samples": 0}
    lag = config["batch"]["minibatches"] if side == SIDES[1] else 0
    rollout = config["rollout"] | {"max_lag": lag}
    train = config["train"] | {"steps": steps}
    if _lines(run_dir / "metrics.jsonl") < steps:
        run_and_weigh(
            written(folder / f"{name}.yaml", config | {"run": run, "rollout": rollout, "train": train}), run_dir
        )
    return read_metrics(run_dir)


def cpu_of(run_dir: Path) -> dict[str, float]:
    cpu: dict[str, float] = json.loads((run_dir / "cpu.json").read_text(encoding="utf-8"))
    return {f"cpu_{kind}_s": seconds for kind, seconds in cpu.items()} | {"cpu_s": sum(cpu.values())}


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps after the warm-up."""

    def mean(value: Any) -> float:
        return statistics.fmean(value(row) for row in rows[WARM_UP:])

    waited = mean(lambda row: row["time/rollout_s"] / row["time/step_s"])
    return {
        "step_s": mean(lambda row: row["time/step_s"]),
        "trainer_idle": mean(lambda row: row["async/trainer_idle_frac"]) if "async/lag_mean" in rows[-1] else waited,
        "rollout_idle": mean(lambda row: row["async/rollout_idle_frac"])
        if "async/lag_mean" in rows[-1]
        else 1 - waited,
        "length_mean": mean(lambda row: row["response/length_mean"]),
        "tokens_per_s": mean(lambda row: row["response/tokens"]) / mean(lambda row: row["time/step_s"]),
        "lag_max": max(row["version/rollout_lag_max"] for row in rows),
        "dropped": sum(row.get("async/dropped_groups", 0.0) for row in rows),
    }


def compare(folder: Path, work: str, steps: int, rounds: int, sft_steps: int) -> dict[str, Any]:
    config = prepare(folder, work, sft_steps)
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES:
            name = f"{side.replace(' ', '_')}_{number}"
            rows = rows_of(folder, config, side, name, WARM_UP + steps, number)
            taken[side].append(figures(rows) | cpu_of(folder / name))
            shown = "  ".join(f"{key} {value:.3f}" for key, value in taken[side][-1].items())
            print(f"{work:10} round {number + 1}  {side:12}  {shown}", flush=True)
    medians = {
        side: {key: statistics.median(figures[key] for figures in rounds_of) for key in rounds_of[0]}
        for side, rounds_of in taken.items()
    }
    ratio = medians[SIDES[1]]["step_s"] / medians[SIDES[0]]["step_s"]
    print(f"{work:10} one step off takes {ratio:.2f} of lock-step's time a step", flush=True)
    return {"medians": medians, "ratio": ratio, "rounds": taken}


def in_flight(folder: Path, steps: int, sft_steps: int) -> dict[str, dict[str, float]]:
    """async/in_flight_k3 by rollout.in_flight, at the quickstart's learning rate on the tail's lengths."""
    config = prepare(folder, "tail", sft_steps)
    config["train"] = config["train"] | {"lr": QUICKSTART["train"]["lr"], "lr_warmup_iters": 0}
    result = {}
    for mode, how in itertools.product(("none", "R3"), ("recompute", "keep")):
        config["rollout"]["in_flight"], config["replay"], name = how, {"mode": mode}, f"{mode} {how}"
        rows = rows_of(folder, config, SIDES[1], f"in_flight_{mode}_{how}", WARM_UP + steps, 0)
        k3 = [row["async/in_flight_k3"] for row in rows if "async/in_flight_k3" in row]
        step_s = statistics.fmean(row["time/step_s"] for row in rows[WARM_UP:])
        result[name] = {"steps": float(len(k3)), "median": statistics.median(k3), "max": max(k3), "step_s": step_s}
        told = f"k3 median {result[name]['median']:.2e}, max {max(k3):.2e} in {len(k3)} steps of {step_s:.2f} s"
        print(f"in-flight  replay {name:15} {told}", flush=True)
    return result


def rewards(folder: Path, seeds: int, sft_steps: int) -> dict[str, list[float]]:
    """Mean reward of the last ten of the quickstart's steps, by side and seed."""
    config, steps = prepare(folder, "quickstart", sft_steps), QUICKSTART["train"]["steps"]
    ends: dict[str, list[float]] = {side: [] for side in SIDES}
    for seed in range(seeds):
        for side in SIDES:
            rows = rows_of(folder, config, side, f"reward_{side.replace(' ', '_')}_{seed}", steps, seed)
            ends[side].append(statistics.fmean(row["reward/mean"] for row in rows[-10:]))
            print(f"reward of the last ten of {steps} steps, seed {seed}, {side}: {ends[side][-1]:.4f}", flush=True)
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="quickstart,tail")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--sft-steps", type=int, default=COLD["train"]["steps"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the runs lie; a temporary one that is removed if unset")
    args = parser.parse_args()
    result: dict[str, Any] = {"steps": args.steps}
    if args.work:
        result["slowdown"] = slowdown()
        print(f"two busy processes take {result['slowdown']:.2f} times as long as one alone", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        base = args.folder or Path(temporary)
        for work in filter(None, args.work.split(",")):
            (folder := base / work).mkdir(parents=True, exist_ok=True)
            if work == "in-flight":
                result[work] = in_flight(folder, args.steps, args.sft_steps)
            else:
                result[work] = compare(folder, work, args.steps, args.rounds, args.sft_steps)
        if args.seeds:
            (folder := base / "reward").mkdir(parents=True, exist_ok=True)
            result["reward"] = rewards(folder, args.seeds, args.sft_steps)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
