"""Runs a plan on this host: one megarl a run directory, all processes
supervised, the first cause of a failure in one line.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megarl.announce import announce, plural
from megarl.door import RUN_SECRET, new_secret
from megarl.launch.lock import owned
from megarl.launch.processes import Plan
from megarl.launch.rank import FAILURES, log_path
from megarl.launch.supervisor import describe_exit, ended_text, supervise


def launch(plan: Plan) -> int:
    """Starts every process of `plan`, waits, ends them all; returns the exit status.
    UserError where run.dir is in use.
    """
    secret = os.environ.get(RUN_SECRET) or new_secret()
    for process in [plan.trainer, *plan.rollouts]:
        process.env[RUN_SECRET] = secret
    with owned(plan.log_dir):
        _fresh(plan.log_dir)
        workers = f" and {plural(len(plan.rollouts), 'rollout worker')}" if plan.rollouts else ""
        announce(f"starting {plural(plan.ranks, 'trainer rank')}{workers}; logs in {plan.log_dir}")
        return supervise(
            plan.trainer,
            plan.rollouts,
            stop_s=plan.stop_s,
            max_restarts=plan.max_restarts,
            explain=lambda: explain_trainer(plan.log_dir),
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
    """The first cause among the ranks' failures: a killed rank before
    one that raised, then the earliest. None if no rank told one.
    """
    try:
        with (log_dir / FAILURES).open(encoding="utf-8") as file:
            failures: list[dict[str, Any]] = [json.loads(line) for line in file]
    except FileNotFoundError:
        return None
    if not failures:
        return None
    first = min(failures, key=lambda failure: ("signal" not in failure, failure["time"]))
    if first.get("user_error"):
        return first["user_error"]
    log = log_path(log_dir, first["rank"])
    how = describe_exit(-first["signal"]) if "signal" in first else "failed"
    return ended_text(f"trainer rank {first['rank']} {how}", log)
