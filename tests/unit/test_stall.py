"""Ranks that wait: their stacks, and who is missing, with processes that are really stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megarl.observe import trace
from megarl.observe.stall import StallWatch, described

RANK = """
import sys, time
from pathlib import Path
from megarl.observe.stall import StallWatch
from megarl.observe.trace import phase

logs, rank, world = Path(sys.argv[1]), int(sys.argv[2]), 3
print("ready", flush=True)
sys.stdin.readline()
StallWatch(logs, rank, world, stall_s=float(sys.argv[3]))

def waits_for_its_peers():
    time.sleep(600)

with phase("update"):
    waits_for_its_peers()
"""


def test_a_stopped_rank_is_named_the_stacks_of_the_others_are_in_their_logs_and_the_first_of_them_ends(
    tmp_path: Path,
) -> None:
    ranks, stopped, first = [], 0, 1
    try:
        for rank in range(3):
            with (tmp_path / f"trainer_{rank}.log").open("wb") as log:
                command = [sys.executable, "-c", RANK, str(tmp_path), str(rank), "3"]
                ranks.append(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
                )
        for each in ranks:
            assert each.stdout is not None and each.stdout.readline() == "ready\n"
        for each in ranks:
            assert each.stdin is not None
            each.stdin.write("\n"), each.stdin.flush()
        pulse, until = tmp_path / "pulse" / f"{stopped}.json", time.monotonic() + 60
        while not pulse.exists() or json.loads(pulse.read_text())["phase"] != "update":
            assert time.monotonic() < until
            time.sleep(0.02)
        ranks[stopped].send_signal(signal.SIGSTOP)
        assert ranks[first].wait(60) == 1 and ranks[stopped].wait(60) == -signal.SIGKILL
        (failure,) = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
        at = f"(pid {ranks[stopped].pid} on {os.uname().nodename})"
        assert failure["stall"].startswith(
            f"no rank went on for launch.stall_s 3 s: rank {stopped} {at} shows no sign of life, last in update; "
            f"ranks 1, 2 in update; stacks are in "
        )
        for rank in (1, 2):
            assert "in waits_for_its_peers" in (tmp_path / f"trainer_{rank}.log").read_text()
    finally:
        for each in ranks:
            each.kill()
            each.communicate()


def test_a_rank_that_is_elsewhere_is_named(tmp_path: Path) -> None:
    pulses = {rank: {"rank": rank, "phase": "rollout" if rank == 2 else "update"} for rank in range(4)}
    assert ": rank 2 in rollout; ranks 0, 1, 3 in update; stacks" in described(pulses, set(), 5.0, tmp_path)


def test_a_wait_that_has_a_limit_of_its_own_is_no_stall_before_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollout of 31 minutes ended the trainers, who stalled in the next one."""
    watch, clock, found = StallWatch(tmp_path, 0, 1, stall_s=0), [0.0], []
    watch._stall_s = 1800
    monkeypatch.setattr(trace.time, "monotonic", lambda: clock[0])
    for within_s in (0.0, 60.0, 7200.0):
        clock[0] = 0.0
        with trace.phase("rollout", within_s):
            for seconds in (1799.0, 1860.0, 7199.0, 7200.0):
                clock[0] = seconds
                found.append(watch._late())
        assert trace.entered()[2] == 0
    assert found == [False, True, True, True] * 2 + [False, False, False, True]


def test_in_a_sync_every_wait_may_take_as_long_as_a_server_that_hangs() -> None:
    """launch.stall_s below sync.timeout_s: a server stopped in a commit, after the last phase, ended the trainers."""
    with trace.waits(145.0):
        with trace.phase("sync"):
            with trace.phase("sync_receive", 7.0):
                assert trace.entered()[::2] == ("sync_receive", 145.0)
            assert trace.entered()[::2] == ("what follows sync_receive", 145.0)
        with trace.phase("canary", 900.0):
            assert trace.entered()[2] == 900
        assert trace.entered()[::2] == ("what follows canary", 145.0)
    assert trace.entered()[::2] == ("what follows canary", 0.0)


def test_a_process_id_of_another_container_is_nobodys_here(tmp_path: Path) -> None:
    """Two containers of one host may share its name and the run's folder; a kill would reach some other process."""
    watch = StallWatch(tmp_path, 0, 3, stall_s=0)
    here = {"host": os.uname().nodename, "pid": 7, "pids": os.readlink("/proc/self/ns/pid")}
    assert watch._here({0: here, 1: here, 2: {**here, "pids": "pid:[1]"}}) == {1}
