"""Runs the parts, each in a process of its own with a time limit, and writes one JSON file a part. bash
tools/bench/gpu.sh calls it.

A part yields what it has found piece by piece, and its file is written after each: one that fails or runs out of time
leaves a file that holds what came before and says so, and the others run all the same. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[3]
# In order of importance; limits in seconds, together below a quarter of an hour.
LIMITS = {
    "ceilings": 40,
    "correctness": 120,
    "train:0": 110,
    "train:1": 110,
    "logprob": 40,
    "sync_ipc": 40,
    "sync_nccl": 40,
    "experts": 60,
    "attention": 60,
    "train:2": 80,
    "train:3": 80,
}
LOOPS = {f"loop:{number}": 280 for number in range(4)}  # these want vLLM, and run only where --parts names them
SMOKE_LIMIT = 240
PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine", "apex", "vllm", "numpy", "pydantic")


def machine() -> dict[str, Any]:
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "packages": versions,
        "gpu": card and {"name": card.name, "bytes": card.total_memory, "multiprocessors": card.multi_processor_count},
        "when": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def run_part(name: str, smoke: bool, file: Path) -> int:
    """In the part's own process: what it yields, and what it raised,
    into `file`. A piece {"row": ...} is one more of its rows.
    """
    module, _, case = name.partition(":")
    result: dict[str, Any] = {"part": name, "smoke": smoke, "unfinished": True, **machine()}
    begun = time.perf_counter()

    def write() -> None:
        result["part_s"] = time.perf_counter() - begun
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    try:
        write()
        part = importlib.import_module(f"tools.bench.gpu.{module}")
        for piece in part.run(smoke, int(case)) if case else part.run(smoke):
            if "row" in piece:
                result.setdefault("rows", []).append(piece["row"])
            else:
                result |= piece
            write()
        del result["unfinished"]
    except Exception as error:  # whatever it is, the file must say it and the other parts must run
        result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        result["traceback"] = traceback.format_exc()[-3000:]
    write()
    return int("error" in result or result.get("passed") is False)


def start(name: str, smoke: bool, out: Path, limit: float) -> bool:
    file = out / f"{name.replace(':', '_')}.json"
    file.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "tools.bench.gpu.run",
        "--part",
        name,
        "--file",
        str(file),
        *(["--cpu-smoke"] if smoke else []),
    ]
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(limit)
        error = f"ended with status {status}"
    except subprocess.TimeoutExpired:
        _kill(process)
        status, error = 1, f"over its limit of {limit:.0f} s"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"part": name, "unfinished": True}
    if "unfinished" in result and "error" not in result:
        result["error"] = error
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{name:14} {'FAILED' if status else 'ok'} in {time.perf_counter() - begun:.0f} s -> {file}", flush=True)
    print(headline(result), flush=True)
    return not status


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and its group, and waits until what it started is gone too: the next part needs its memory."""
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(started, timeout=60)


def headline(result: dict[str, Any]) -> str:
    """The numbers of a part that docs/gpu.md lists, one line a row."""
    wanted = (
        "tokens",
        "experts",
        "dtype",
        "pack",
        "way",
        "layers",
        "tokens_per_s",
        "mfu",
        "mfu_of_48_layers",
        "replay_cost",
        "logprobs",
    )
    wanted += (
        "gradient",
        "passed",
        "flops_per_s",
        "copy_bytes_per_s",
        "matmul_flops_per_s",
        "extra_bytes",
        "sync_bytes_per_s",
        "of_copy",
    )
    wanted += ("step", "time/step_s", "time/rollout_s", "time/update_s", "time/sync_s", "mismatch/kl_k3")
    wanted += ("bytes_per_s", "what", "seconds", "of_ceiling", "equal", "error")
    show = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
    rows = (
        result["rows"] + ([{"error": result["error"]}] if "error" in result else []) if "rows" in result else [result]
    )
    return "\n".join("    " + ", ".join(f"{k} {show(row[k])}" for k in wanted if k in row) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help=f"only these, with commas between, of {','.join(LIMITS | LOOPS)}")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds for all; what does not fit is named at the end"
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    parser.add_argument(
        "--cpu-smoke",
        action="store_true",
        help="every part at a tiny size on this CPU: proves that the scripts run, no more",
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return run_part(args.part, args.cpu_smoke, args.file)
    wanted = args.parts.split(",") if args.parts else list(LIMITS)
    if unknown := [name for name in wanted if name not in LIMITS | LOOPS]:
        parser.error(f"--parts {','.join(unknown)}: no such part; all are {','.join(LIMITS | LOOPS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.budget
    passed, left = [], []
    for name in wanted:
        limit = SMOKE_LIMIT if args.cpu_smoke else (LIMITS | LOOPS)[name]
        if limit <= end - time.monotonic():
            passed.append(start(name, args.cpu_smoke, args.out, limit))
        else:
            left.append(name)
    print(f"{sum(passed)} of {len(passed)} parts ok; machine: {json.dumps(machine())}")
    if left:
        print(f"not run within --budget {args.budget:.0f}: bash tools/bench/gpu.sh --parts {','.join(left)}")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
