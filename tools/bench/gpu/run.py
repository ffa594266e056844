"""Runs the parts, each in a process of its own with a time limit, and writes one JSON file a part. bash tools/bench/gpu.sh calls it.

A part that fails or runs out of time writes a file that says so; the others run all the same. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
CALLS = {  # parts of one call of the lent machine and their limits in seconds: no call takes more than ten minutes
    1: {"ceilings": 60, "correctness": 150, "attention": 120, "logprob": 90, "sync_ipc": 60, "sync_nccl": 60},
    2: {"train:0": 280, "train:1": 280},
    3: {"train:2": 280, "train:3": 280},
}
SMOKE_LIMIT = 240
PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine", "apex", "vllm", "numpy", "pydantic")


def machine() -> dict[str, Any]:
    import torch

    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "packages": found,
        "gpu": card and {"name": card.name, "bytes": card.total_memory, "multiprocessors": card.multi_processor_count},
        "when": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def run_part(name: str, smoke: bool, file: Path) -> int:
    """In the part's own process: its result, or what it raised, into `file`."""
    module, _, case = name.partition(":")
    result: dict[str, Any] = {"part": name, "smoke": smoke, **machine()}
    begun = time.perf_counter()
    try:
        part = importlib.import_module(f"tools.bench.gpu.{module}")
        result |= part.run(smoke, int(case)) if case else part.run(smoke)
    except Exception as error:  # whatever it is, the file must say it and the other parts must run
        result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        import traceback

        result["traceback"] = traceback.format_exc()[-3000:]
    result["part_s"] = time.perf_counter() - begun
    file.write_text(json.dumps(result, indent=1) + "\n")
    return int("error" in result or result.get("passed") is False)


def start(name: str, smoke: bool, out: Path, limit: float) -> bool:
    file = out / f"{name.replace(':', '_')}.json"
    command = [sys.executable, "-m", "tools.bench.gpu.run", "--part", name, "--file", str(file), *(["--cpu-smoke"] if smoke else [])]
    begun = time.perf_counter()
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=limit).returncode
        what = "ok" if not status else "FAILED"
        if status and not file.exists():
            file.write_text(json.dumps({"part": name, "error": f"ended with status {status}"}) + "\n")
    except subprocess.TimeoutExpired:
        what = f"FAILED: over {limit:.0f} s"
        file.write_text(json.dumps({"part": name, "error": f"over its limit of {limit:.0f} s"}) + "\n")
    print(f"{name:14} {what} in {time.perf_counter() - begun:.0f} s -> {file}", flush=True)
    print(headline(json.loads(file.read_text())), flush=True)
    return what == "ok"


def headline(result: dict[str, Any]) -> str:
    """The numbers of a part that docs/gpu.md lists, one line a row."""
    if "error" in result:
        return f"    {result['error']}"
    wanted = ("tokens", "experts", "dtype", "pack", "way", "layers", "tokens_per_s", "mfu", "mfu_of_48_layers", "replay_cost", "logprobs")
    wanted += ("gradient", "passed", "flops_per_s", "copy_bytes_per_s", "matmul_flops_per_s", "extra_bytes", "sync_bytes_per_s", "of_copy")
    wanted += ("bytes_per_s", "equal", "error")
    show = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
    return "\n".join("    " + ", ".join(f"{k} {show(row[k])}" for k in wanted if k in row) for row in result.get("rows", [result]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", type=int, choices=sorted(CALLS), action="append", help="only the parts of this call; may be repeated")
    parser.add_argument("--parts", help="only these, e.g. logprob,train:1")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    parser.add_argument(
        "--cpu-smoke", action="store_true", help="every part at a tiny size on this CPU: proves that the scripts run, no more"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return run_part(args.part, args.cpu_smoke, args.file)
    limits = {name: limit for call in args.call or sorted(CALLS) for name, limit in CALLS[call].items()}
    if args.parts:
        limits = {name: limit for name, limit in limits.items() if name in args.parts.split(",")}
    args.out.mkdir(parents=True, exist_ok=True)
    passed = [start(name, args.cpu_smoke, args.out, SMOKE_LIMIT if args.cpu_smoke else limit) for name, limit in limits.items()]
    print(f"{sum(passed)} of {len(passed)} parts ok; machine: {json.dumps(machine())}")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
