"""Faults in real runs, one after the other: what each costs, and that no step or prompt is lost or done twice.

    python tools/faults.py [--short] [--run NAME] [--json FILE] [--table FILE] [--only WORD] [--folder DIR]

`megarl run` of a tiny model, three times: trainers that fail, one step off under TP2, one server, a checkpoint every
other step, in a small file system where the user may mount one; then two servers whose processes fail, in lock-step
under DP2, and again two steps off. Where the user may make networks, a run by the commands of many nodes: two torchruns
with --max-restarts, and `megarl rollout` on another host. A fault is injected when its phase begins, by trace.json.
Where the command itself ends, the same command is given again. With --folder, this one goes on where it has ended;
SIGUSR1 ends a run before its next fault. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megarl.errors import UserError
from tools.digit_sum import write_task
from tools.fault_kinds import (
    Cable,
    Fault,
    ahead_faults,
    may_make_networks,
    outer_faults,
    slow,
    struck,
    trainer_faults,
    worker_faults,
)
from tools.fault_run import LIMIT_S, PROMPTS, OuterRun, Run
from tools.tiny_model import make_tiny_model

TRAIN = 40_000  # prompts: more than the steps of a run take, so that each comes once
DISK_MIB = 96
RUNS = ("trainers", "workers", "ahead", "torchrun")
# a server is missed after 15 silent seconds and a question of 10: ranks that wait for it meanwhile are no stall
WORKERS: dict[str, Any] = {"rollout": {"engines": 2}, "sync": {"timeout_s": 30}, "launch": {"stall_s": 60}}
AHEAD = WORKERS | {"rollout": {"engines": 2, "max_lag": 2}, "run": {"save_every": 2, "keep": 4}}
TRAINERS: dict[str, Any] = {
    "parallel": {"tp": 2},
    "rollout": {"engines": 1, "max_lag": 2},
    "sync": {"timeout_s": 10},
    "run": {"save_every": 2, "keep": 4},
}
OUTER: dict[str, Any] = {
    "rollout": {"engines": 1, "request_timeout_s": 60},
    "sync": {"timeout_s": 10},
    "run": {"save_every": 2},
}
enough: list[int] = []  # SIGUSR1 came: no more faults, the run ends and is accounted for
SHORT = [
    slow("engine core", "sync receive"),
    struck("SIGKILL", "API server", "sync receive"),
    struck("SIGKILL", "rank 1", "update", restarts=True),  # while the server is still being started again
]


@dataclass
class Outcome:
    """seconds: from the fault to the end of a step that was not done before; whole_s: until all workers serve again.

    prompts: that were sampled again, at most: what a lost worker had at work, or those of the steps done again and of
    the batches that were being sampled.
    """

    fault: str
    seconds: float = 0.0
    whole_s: float = 0.0
    steps: int = 0
    prompts: int = 0
    error: str = ""


def suffer(run: Run, fault: Fault, whole: bool = True) -> Outcome:
    """Injects it into a run that goes on, and waits until that does again; whole: and until all workers serve.
    UserError where it does not.
    """
    before = run.step()
    run.wait(lambda: run.step() > before and (run.saved() or not fault.restarts), "step and checkpoint", again=True)
    asked, lost, failing = run.asked_again(), run.lost(), run.trainers()
    start = fault.do(run)
    done = lowest = run.step()

    def further() -> bool:
        nonlocal lowest, done
        step = run.step()
        if fault.restarts and run.trainers() in ([], failing):  # a step that was at its end is none after the fault
            done = max(done, step)
            return False
        lowest = min(lowest, step or lowest)
        return step > done

    run.wait(further, "step after the fault", again=True)
    seconds = time.monotonic() - start
    fault.mend(run)
    run.workers += fault.more
    if whole:
        run.wait(lambda: run.lost() - lost >= fault.loses, "loss that is noticed", again=True)
        run.wait(lambda: run.last()["fleet/workers"] == run.workers, "all workers", again=True)
    whole_s, steps = time.monotonic() - start, done - lowest
    ahead = 1 + run.batches_ahead
    prompts = (steps + ahead) * PROMPTS if fault.restarts else run.asked_again() - asked
    return Outcome(fault.name, seconds, whole_s, steps, prompts)


def suffer_all(run: Run, faults: list[Fault], short: bool) -> Iterator[Outcome]:
    """A run that a fault was too much for is ended as a whole, and begins again from its last checkpoint."""
    for fault in faults:
        if enough:
            return
        try:
            yield suffer(run, fault, whole=not short or fault is faults[-1])
        except (UserError, OSError, subprocess.SubprocessError) as error:
            yield Outcome(fault.name, LIMIT_S, LIMIT_S, error=str(error))
            run.kill()
            run.start()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Whether `folder` is a file system of DISK_MIB, while inside."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


class Outcomes:
    """In files, so that the same command goes on after the last of them. accounts: lost and doubled, of runs that have
    ended.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._accounts = folder / "outcomes.jsonl", folder / "accounts.json"
        kept = json.loads(self._accounts.read_text("utf-8")) if self._accounts.exists() else {}
        self.accounts: dict[str, tuple[int, int]] = {name: (lost, doubled) for name, (lost, doubled) in kept.items()}
        lines = self._file.read_text("utf-8").splitlines() if self._file.exists() else []
        self.all = [Outcome(**json.loads(line)) for line in lines]

    def add(self, outcome: Outcome) -> None:
        self.all.append(outcome)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        print(line_of(outcome), flush=True)

    def close(self, name: str, account: tuple[int, int]) -> tuple[int, int]:
        self.accounts[name] = account
        self._accounts.write_text(json.dumps(self.accounts), encoding="utf-8")
        return account

    def rest(self, faults: list[Fault]) -> list[Fault]:
        names = {outcome.fault for outcome in self.all}
        return [fault for fault in faults if fault.name not in names]


def all_runs(folder: Path, runs: list[str], only: str, outcomes: Outcomes) -> Iterator[tuple[int, int]]:
    """Of each run what was lost and doubled, steps and prompts; what is in `outcomes` is not injected again."""
    make_tiny_model(folder / "model")
    write_task(folder / "data", train=TRAIN, valid=8, demos=8)

    def run_of(name: str, settings: dict[str, Any], faults: list[Fault], cable: Cable | None) -> tuple[int, int]:
        chosen = [fault for fault in faults if only in fault.name]
        if not chosen or name in outcomes.accounts:
            return outcomes.accounts.get(name, (0, 0))
        chosen = outcomes.rest(chosen)
        kind = OuterRun if name == "torchrun" else Run
        run = kind(folder / name, folder / "model", folder / "data" / "train.jsonl", settings, cable)
        try:
            for outcome in suffer_all(run, chosen, name == "short"):
                outcomes.add(outcome)
            return outcomes.close(name, run.end())
        finally:
            run.kill()

    if "short" in runs:
        yield run_of("short", WORKERS | {"run": {"save_every": 2}}, SHORT, None)
    if "trainers" in runs:
        with small_disk(folder / "trainers") as mounted:
            yield run_of("trainers", TRAINERS, trainer_faults(mounted), None)
    if "ahead" in runs:
        yield run_of("ahead", AHEAD, ahead_faults(), None)
    with contextlib.ExitStack() as stack:
        wanted = {"workers", "torchrun"} & {*runs} and may_make_networks()
        cable = stack.enter_context(contextlib.closing(Cable())) if wanted else None
        if "workers" in runs:
            yield run_of("workers", WORKERS, worker_faults(bool(cable)), cable)
        if "torchrun" in runs and cable:
            yield run_of("torchrun", OUTER, outer_faults(), cable)


def line_of(outcome: Outcome) -> str:
    cells = [outcome.fault, f"{outcome.seconds:.1f}", f"{outcome.whole_s:.1f}", outcome.steps, outcome.prompts]
    return "| " + " | ".join(map(str, cells)) + f" |{' ' + outcome.error if outcome.error else ''}"


HEAD = """| fault | seconds to recover | until all workers serve | steps done again | prompts sampled again |
|---|---|---|---|---|"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="three faults in a run of their own, for CI")
    parser.add_argument("--run", choices=RUNS, help="one of them")
    parser.add_argument("--json", type=Path, help="a file that gets every outcome")
    parser.add_argument("--table", type=Path, help="a page whose table is made anew, docs/faults.md")
    parser.add_argument("--only", default="", help="faults whose name holds this word")
    parser.add_argument("--folder", type=Path, help="where the runs lie; a temporary one that is removed if unset")
    args = parser.parse_args(argv)
    if args.table and not args.table.is_file():
        parser.error(f"--table {args.table} is no page; it must be there, with a table in it")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="faults_"))
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so ends the run
    signal.signal(signal.SIGUSR1, lambda number, _: enough.append(number))
    kept = Outcomes(folder)
    print(HEAD, flush=True)
    runs = ["short"] if args.short else [args.run] if args.run else [*RUNS]
    accounts = [*all_runs(folder, runs, args.only, kept)]
    outcomes = kept.all
    lost, doubled = (sum(numbers) for numbers in zip(*accounts, strict=True))
    good = [outcome for outcome in outcomes if not outcome.error]
    summary = {
        "injected": len(outcomes),
        "survived": len(good),
        "lost": lost,
        "doubled": doubled,
        "median_recovery_s": round(statistics.median(outcome.seconds for outcome in good), 1) if good else None,
    }
    if args.json:
        report = summary | {"faults": [asdict(one) for one in outcomes]}
        args.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if args.table:
        write_table(args.table, outcomes, summary)
    if args.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(summary))
    return 0 if len(good) == len(outcomes) and not lost and not doubled else 1


def write_table(page: Path, outcomes: list[Outcome], summary: dict[str, Any]) -> None:
    """Between the page's first table line and what follows the table; and the line of the summary."""
    text = page.read_text("utf-8")
    before, _, after = text.partition("| fault |")
    rest = after.split("\n\n", 1)[1]
    table = "\n".join([HEAD, *map(line_of, outcomes)])
    told = f"{rest.partition('`{')[0]}`{json.dumps(summary)}`{rest.partition('}`')[2]}"
    page.write_text(f"{before}{table}\n\n{told}", "utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
