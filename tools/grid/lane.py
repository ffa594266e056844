"""A lane: one trainer rank and one vLLM server that do run after run,
so that a short run does not pay for starting them.

    megarl.launch.rank LOG_DIR tools.grid.lane QUEUE OUT DEADLINE BASE key=value ...      started by tools/paper_grid.py

Every run is the trainer's own `train(config)`; only the fleet of workers outlives
it. A run begins with a weight sync, so that nothing of the one before it is left
in the server. Lanes share a queue: a run belongs to the lane that holds its lock.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megarl.checkpoints import finished
from megarl.config import load_config
from megarl.engine.parallel import destroy_parallel
from megarl.errors import UserError
from megarl.rollout.fleet import Fleet
from megarl.train import train
from tools.grid.arms import RECORD, Arm, Run, ended


class LastingFleet(Fleet):
    """Closed by its lane, not by the runs that use it."""

    def close(self) -> None:
        """Of one run: lets go of its way of sending weights. The next run connects anew."""
        self._leave_group()

    def leave(self) -> None:
        super().close()


def main(argv: list[str]) -> int:
    out = Path(argv[1])
    runs = [
        Run(Arm(**item["arm"]), item["seed"], item["steps"])
        for item in json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    ]
    deadline, lane = float(argv[2]), load_config(argv[3], argv[4:])
    fleet: list[LastingFleet] = []

    def connect(config: Any, device: Any, *, is_ingest: bool, hosts: Any) -> Fleet:
        if not fleet:
            fleet.append(LastingFleet(lane, device, is_ingest=is_ingest, hosts=hosts))
        return fleet[0]

    status = 0
    for run in runs:
        if time.time() > deadline:
            break
        with _claimed(out, run) as claimed:
            if claimed and not ended(out, run) and not _do(run, out, connect, fleet):
                status = 3  # the server may be in an unknown state: the next lane starts a fresh one
                break
    for connection in fleet:
        connection.leave()
    destroy_parallel()
    return status


def _do(run: Run, out: Path, connect: Any, fleet: list[LastingFleet]) -> bool:
    """One run, from its beginning or its checkpoint. False if it failed;
    the failure is in its record, and the run is not tried again.
    """
    config = run.config(out)
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    before = _cpu_seconds(fleet)
    start, failure = time.time(), None
    print(f"{time.strftime('%H:%M:%S')} {run.name}", flush=True)
    try:
        if finished(config) is None:
            with (folder / "out.txt").open("a", encoding="utf-8") as text, redirect_stdout(text):
                train(config, connect)
    except UserError as error:
        if not (folder / "metrics.jsonl").is_file() or not (folder / "metrics.jsonl").stat().st_size:
            raise  # it never began: no result, but a server that did not start
        failure = str(error)
    after = _cpu_seconds(fleet)
    record = {
        "arm": asdict(run.arm),
        "seed": run.seed,
        "steps": run.steps,
        "lr": run.lr,
        "failure": failure,
        "wall_s": time.time() - start,
    }
    record |= {"trainer_cpu_s": after[0] - before[0], "server_cpu_s": after[1] - before[1] if before[1] else None}
    partial = folder / f".{RECORD}.partial"
    partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    partial.rename(folder / RECORD)
    gc.collect()
    return failure is None


def _cpu_seconds(fleet: list[LastingFleet]) -> tuple[float, float]:
    """CPU seconds so far of this process and of its server (0 before it
    is known), which leads a process group of its own.
    """
    groups = {worker.pid for worker in fleet[0].workers} if fleet else set()
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # a process that has just ended
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
            if int(fields[2]) in groups:
                ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return time.process_time(), ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def _claimed(out: Path, run: Run) -> Iterator[bool]:
    """Whether the run is ours until we leave; the kernel gives the lock up if we are killed."""
    (out / "locks").mkdir(parents=True, exist_ok=True)
    with (out / "locks" / run.name).open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
