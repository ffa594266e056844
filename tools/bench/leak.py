"""Resident memory of every process of a run after step 20 and after
step 200; exit status 1 if one has grown by more than 5%.

    python tools/bench/leak.py [--layout dp2] [--limit 1.05] [key=value ...]

The work is that of tools/bench/step.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megarl.launch.lifeline import descendants  # noqa: E402
from tools.bench.step import LAYOUTS, configuration  # noqa: E402
from tools.digit_sum import write_task  # noqa: E402
from tools.tiny_model import make_tiny_model  # noqa: E402

FIRST, LAST, STEPS = 20, 200, 220
KINDS = {  # a word of the command line -> what the process is
    "megarl.launch.torchrun": "torchrun",
    "megarl.launch.rank": "trainer rank",
    "megarl.cli rollout": "rollout supervisor",
    "api_server": "vLLM API server",
    "EngineCore": "vLLM EngineCore",
    "megarl.cli run": "megarl run",
}


def resident(root: int) -> dict[int, int]:
    """pid -> resident bytes (VmRSS) of `root` and all below it."""
    rss = {}
    for pid in [root, *descendants(root)]:
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
            rss[pid] = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
        except (OSError, StopIteration):  # it has ended
            continue
    return rss


def kind(pid: int) -> str:
    line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return next((name for word, name in KINDS.items() if word in line), line[:40])


def wait_for_step(run: subprocess.Popen[bytes], metrics: Path, step: int) -> None:
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        if run.poll() is not None:
            sys.exit(f"the run ended with status {run.returncode} before step {step}")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="dp2", choices=list(LAYOUTS))
    parser.add_argument("--limit", type=float, default=1.05)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_tiny_model(folder / "model")
        write_task(folder / "data", digits=7)
        config = configuration(folder, args.layout, STEPS)
        path = folder / "leak.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "megarl.cli", "run", str(path), *args.overrides]
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        metrics = Path(config["run"]["dir"]) / "metrics.jsonl"
        try:
            wait_for_step(run, metrics, FIRST)
            early = resident(run.pid)
            names = {pid: kind(pid) for pid in early}
            wait_for_step(run, metrics, LAST)
            late = resident(run.pid)
        finally:
            run.terminate()
            run.wait()
    sys.exit(0 if table(names, early, late) <= args.limit else 1)


def table(names: dict[int, str], early: dict[int, int], late: dict[int, int]) -> float:
    """Prints a line a process; returns the largest ratio."""
    print(f"{'resident MiB':20}{f'step {FIRST}':>10}{f'step {LAST}':>10}{'ratio':>8}")
    seen: Counter[str] = Counter()
    worst = 0.0
    for pid in sorted(early):
        if pid not in late:
            continue
        ratio = late[pid] / early[pid]
        worst = max(worst, ratio)
        name = f"{names[pid]} {seen[names[pid]]}" if list(names.values()).count(names[pid]) > 1 else names[pid]
        seen[names[pid]] += 1
        print(f"{name:20}{early[pid] / 2**20:10.1f}{late[pid] / 2**20:10.1f}{ratio:8.3f}")
    for pid in sorted(late.keys() - early.keys()):
        print(f"{'new, pid ' + str(pid):20}{'':10}{late[pid] / 2**20:10.1f}")
    return worst


if __name__ == "__main__":
    main()
