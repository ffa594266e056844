"""Faults in a real run, one after the other: what each costs, and that no step or prompt is lost or done twice.

    python tools/faults.py [--short] [--json] [--only WORD] [--folder DIR]

`megarl run` of a tiny model: two trainer ranks, two rollout servers, a checkpoint every other step. A fault is injected
where the phase before the named one has ended, by trace.json; where the command itself ends, the same command is given
again, as a user would. The last line of the output is one JSON object; --json prints nothing else.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megarl.checkpoints import newest, state_of, step_of, whole_checkpoints
from megarl.data.stream import PromptStream, content_digest
from megarl.errors import UserError
from megarl.observe.metrics import last_step, read_metrics
from megarl.observe.stall import PULSE
from tools.digit_sum import write_task
from tools.tiny_model import make_tiny_model

PROMPTS, TRAIN, STEPS = 4, 512, 100_000
STALL_S, LIMIT_S = 20, 240  # launch.stall_s; how long one fault may take
AFTER = {  # phase -> the one whose end in trace.json is its beginning
    "rollout": "canary",
    "old_logprob": "reward",
    "update": "old_logprob",
    "sync": "update",
    "canary": "sync",
}
PROCESSES = {  # who -> what stands in the command line
    "torchrun": "megarl.launch.torchrun",
    "rollout worker": " rollout ",
    "API server": "vllm.entrypoints.openai.api_server",
}


class Run:
    """The command, and what can be seen of it from outside."""

    def __init__(self, folder: Path) -> None:
        self.dir, self._config, self._log = folder / "run", folder / "run.yaml", folder / "out.txt"
        make_tiny_model(folder / "model")
        self.prompts = folder / "data" / "train.jsonl"
        write_task(folder / "data", train=TRAIN, valid=8, demos=8)
        self._config.write_text(yaml.safe_dump(self._settings(folder)), encoding="utf-8")
        self.starts = 0
        self.start()

    def _settings(self, folder: Path) -> dict[str, Any]:
        return {
            "model": {"path": str(folder / "model")},
            "data": {"prompts": str(self.prompts), "reward": "digit_sum"},
            "batch": {"prompts": PROMPTS, "group": 2, "minibatches": 2},  # two: pi_old is then a phase of its own
            "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 9, "engines": 2, "request_timeout_s": 60},
            "train": {"steps": STEPS, "lr": 1e-4},
            "sync": {"timeout_s": 30},
            "run": {"dir": str(self.dir), "save_every": 2},
            "launch": {"trainers": 2, "stall_s": STALL_S, "max_restarts": 1000},
        }

    def start(self) -> None:
        command = [sys.executable, "-m", "megarl", "run", str(self._config)]
        with self._log.open("ab") as log:
            self.popen = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.starts += 1

    def wait(self, condition: Callable[[], Any], what: str, *, again: bool = False) -> None:
        """again: the same command is given again when it ends."""
        until = time.monotonic() + LIMIT_S
        while not condition():
            if self.popen.poll() is not None:
                if not again:
                    raise UserError(f"the run ended before {what}: {self.tail()}")
                self.start()
            if time.monotonic() > until:
                raise UserError(f"no {what} within {LIMIT_S} s: {self.tail()}")
            time.sleep(0.002)

    def tail(self) -> str:
        return "\n".join(self._log.read_text("utf-8", errors="replace").splitlines()[-12:])

    def steps(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return last_step(self.dir)
        return 0

    def pid(self, who: str) -> int:
        """`who`: supervisor, rank N, or one of PROCESSES (the first of them)."""
        if who == "supervisor":
            return self.popen.pid
        if who.startswith("rank "):
            return int(json.loads((self.dir / "logs" / PULSE / f"{who[5:]}.json").read_text("utf-8"))["pid"])
        for child in sorted(psutil.Process(self.popen.pid).children(recursive=True), key=lambda child: child.pid):
            with contextlib.suppress(psutil.Error):
                if PROCESSES[who] in " ".join(child.cmdline()) + " ":
                    return child.pid
        raise UserError(f"no {who} is running: {self.tail()}")

    def until(self, phase: str) -> None:
        """Returns when rank 0 begins `phase`."""
        if phase == "checkpoint":
            self.wait(lambda: any((self.dir / "checkpoints").glob(".step_*.partial")), phase)
            return
        trace = self.dir / "trace.json"
        with trace.open("rb") as file:
            file.seek(0, os.SEEK_END)
            mark = f'"name": "{AFTER[phase]}"'.encode()
            self.wait(lambda: mark in file.read(), phase)

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGINT)
            try:
                self.popen.wait(LIMIT_S)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.popen.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Fault:
    """what: a signal, or how the newest checkpoint is harmed before the whole command is killed."""

    who: str
    phase: str
    what: str

    @property
    def name(self) -> str:
        return f"{self.what} of {self.who} in {self.phase}"

    def inject(self, run: Run) -> None:
        run.until(self.phase)
        if self.what.startswith("SIG"):
            os.kill(run.pid(self.who), signal.Signals[self.what])
            return
        run.popen.kill()
        run.popen.wait()
        last = newest(run.dir / "checkpoints")
        assert last is not None
        part = next(path for path in sorted(last.glob("*.distcp")))
        data = part.read_bytes()
        if self.what == "missing part":
            part.unlink()
            return
        part.write_bytes(data[: len(data) // 2] if self.what == "truncation" else data[:-99] + b"x" + data[-98:])


def faults() -> list[Fault]:
    found = [
        Fault(who, phase, what)
        for what in ("SIGKILL", "SIGSTOP")
        for who in ("rank 0", "rank 1")
        for phase in (*AFTER, "checkpoint")
    ]
    found += [Fault("torchrun", phase, "SIGKILL") for phase in (*AFTER, "checkpoint")]
    found += [
        Fault("supervisor", phase, what) for what in ("SIGKILL", "SIGTERM") for phase in ("rollout", "checkpoint")
    ]
    found += [Fault("supervisor", "update", "SIGINT")]
    found += [Fault("newest checkpoint", "rollout", what) for what in ("truncation", "another byte", "missing part")]
    found += [Fault(who, phase, "SIGKILL") for who in ("API server", "rollout worker") for phase in ("rollout", "sync")]
    found += [Fault("API server", phase, "SIGSTOP") for phase in ("rollout", "sync")]
    return [*found, Fault("rollout worker", "rollout", "SIGTERM")]


SHORT = ("SIGKILL of rank 1 in rollout", "SIGSTOP of rank 0 in update", "truncation of newest checkpoint in rollout")


@dataclass
class Outcome:
    fault: str
    recovery_s: float
    steps_again: int
    error: str = ""
    done: int = field(default=0, repr=False)


def suffer(run: Run, fault: Fault) -> Outcome:
    """From the fault to the first row of a step that was not done before."""
    at = run.steps()
    run.wait(lambda: run.steps() > at and newest(run.dir / "checkpoints"), "a step and a checkpoint", again=True)
    fault.inject(run)
    start, done = time.monotonic(), run.steps()
    lowest = done

    def further() -> bool:
        nonlocal lowest
        steps = run.steps()
        lowest = min(lowest, steps) if steps else lowest
        return steps > done

    try:
        run.wait(further, "step after the fault", again=True)
    except UserError as error:
        return Outcome(fault.name, LIMIT_S, done - lowest, str(error))
    return Outcome(fault.name, time.monotonic() - start, done - lowest)


def account(run: Run) -> tuple[int, int]:
    """Steps lost and done twice; and prompts: the stream of the last checkpoint stands where as many steps put it."""
    lines = (run.dir / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [row["step"] for row in read_metrics(run.dir)]
    lost, doubled = steps[-1] - len(set(steps)), len(lines) - len(steps)
    last = whole_checkpoints(run.dir / "checkpoints")[-1]
    stream = PromptStream(TRAIN, 0, True, content_digest(str(run.prompts)))
    for _ in range(step_of(last)):
        stream.next(PROMPTS)
    want, found = stream.state_dict(), state_of(last)["stream"]
    differs = any(found.get(key) != value for key, value in want.items())
    return lost + differs, doubled


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="three faults, for CI")
    parser.add_argument("--json", action="store_true", help="nothing but the last line")
    parser.add_argument("--only", default="", help="faults whose name holds this word")
    parser.add_argument("--folder", type=Path, help="where the run lies; a temporary one that is removed if unset")
    args = parser.parse_args(argv)
    chosen = [fault for fault in faults() if args.only in fault.name and (fault.name in SHORT or not args.short)]
    say = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    folder = args.folder or Path(tempfile.mkdtemp(prefix="faults_"))
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so ends the run
    run, outcomes = Run(folder), []
    say("| fault | seconds to recover | steps done again |\n|---|---|---|")
    try:
        for fault in chosen:
            outcome = suffer(run, fault)
            outcomes.append(outcome)
            say(f"| {fault.name} | {outcome.recovery_s:.1f} | {outcome.steps_again} |")
            if outcome.error:
                say(outcome.error)
                run.popen.kill()  # what is left of the run ends with it; the next fault finds a new start
    finally:
        run.close()
    lost, doubled = account(run)
    good = [outcome.recovery_s for outcome in outcomes if not outcome.error]
    summary = {
        "injected": len(outcomes),
        "survived": len(good),
        "lost": lost,
        "doubled": doubled,
        "median_recovery_s": round(statistics.median(good), 1) if good else None,
        "faults": {outcome.fault: round(outcome.recovery_s, 1) for outcome in outcomes},
    }
    if args.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(summary))
    return 0 if len(good) == len(outcomes) and not lost and not doubled else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
