"""Runs a plan on this host: one megarl a run directory, all processes
supervised, the first cause of a failure in one line.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarl.announce import announce, plural
from megarl.checkpoints import newest, step_of
from megarl.door import RUN_SECRET, new_secret, run_secret
from megarl.launch.backoff import Backoff
from megarl.launch.lock import owned
from megarl.launch.processes import Plan
from megarl.launch.rank import FAILURES, log_path
from megarl.launch.scratch import scratch
from megarl.launch.supervisor import describe_exit, ended_text, supervise


def launch(plan: Plan, done: Callable[[], int] = lambda: 0) -> int:
    """Starts every process of `plan`, waits, ends them all; returns the exit status. done(): the last step of the run
    that has metrics. UserError where run.dir is in use.
    """
    secret = run_secret() or (new_secret() if plan.rollouts else "")  # workers that others start cannot know a new one
    with owned(plan.log_dir), scratch() as environment:
        for process in [plan.trainer, *plan.rollouts]:
            process.env |= {RUN_SECRET: secret, **environment}
        _fresh(plan.log_dir)
        workers = f" and {plural(len(plan.rollouts), 'rollout worker')}" if plan.rollouts else ""
        announce(f"starting {plural(plan.ranks, 'trainer rank')}{workers}; logs in {plan.log_dir}")
        if plan.store:
            token = " and this MEGARL_TOKEN" if secret else ""
            announce(f"rollout workers join by megarl rollout CONFIG launch.store={plan.store}{token}")
        return supervise(
            plan.trainer,
            plan.rollouts,
            stop_s=plan.stop_s,
            max_restarts=plan.max_restarts,
            explain=lambda: explain_trainer(plan.log_dir),
            again=Restarts(plan, done).after,
        )


def _fresh(log_dir: Path) -> None:
    """An empty folder for this start's logs; those of the start before
    are kept beside it, for a run that resumes after a crash.
    """
    if log_dir.exists():
        before = log_dir.with_name(log_dir.name + ".previous")
        shutil.rmtree(before, ignore_errors=True)
        log_dir.rename(before)
    log_dir.mkdir(parents=True)


def explain_trainer(log_dir: Path) -> str | None:
    """The first cause among the ranks' failures, and its log. None if no rank told one."""
    first = first_failure(log_dir)
    if first is None:
        return None
    if first.get("user_error"):
        return first["user_error"]
    return ended_text(_what(first), log_path(log_dir, first["rank"]))  # a stall's line is the last of its log


def first_failure(log_dir: Path) -> dict[str, Any] | None:
    """Ranks that found themselves stuck before one that was killed before one that raised, then the earliest. A line
    that a full disk or a kill has torn is left out.
    """
    failures: list[dict[str, Any]] = []
    try:
        with (log_dir / FAILURES).open(encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    failures.append(json.loads(line))
    except FileNotFoundError:
        return None
    return min(
        failures, key=lambda failure: ("stall" not in failure, "signal" not in failure, failure["time"]), default=None
    )


def _what(failure: dict[str, Any]) -> str:
    if "stall" in failure:
        return failure["stall"]
    how = describe_exit(-failure["signal"]) if "signal" in failure else "failed"
    return f"trainer rank {failure['rank']} {how}"


class Restarts:
    """Whether trainers that failed are started again, from the run's last whole checkpoint; says so in one line.

    Not where a rank told what the user is to mend, nor where one raised before a step was done: it would again.
    """

    def __init__(self, plan: Plan, done: Callable[[], int]) -> None:
        self._plan, self._done, self._backoff = plan, done, Backoff(plan.trainer_restarts)
        self._from = self._saved()

    def after(self, code: int) -> float | None:
        """Seconds to wait before the next start; None where there is to be none. code: torchrun's own end."""
        log_dir = self._plan.log_dir
        first = first_failure(log_dir)
        if first is None:
            if code not in (-signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS):
                return None
            what = f"{self._plan.trainer.name} {describe_exit(code)}"
        else:
            if first.get("user_error") or (not first.keys() & {"signal", "stall"} and self._done() <= self._from):
                return None
            what = _what(first)
        saved = self._saved()
        if saved > self._from:  # it got further than the start before: none of a row
            self._backoff.used = 0
        wait_s = self._backoff.next()
        if wait_s is None:
            return None
        self._backoff.began()
        self._from = saved
        if first is not None:
            (log_dir / FAILURES).rename(log_dir / f"failures.{int(time.time())}.jsonl")
        print(
            f"megarl: {what}; the trainers start again from step {self._from}, restart {self._backoff.used} of "
            f"{self._backoff.most}; logs in {log_dir}",
            file=sys.stderr,
            flush=True,
        )
        return wait_s

    def _saved(self) -> int:
        last = newest(self._plan.log_dir.parent / "checkpoints")
        return step_of(last) if last else 0
