"""Ranks that wait: their stacks, and who is missing, with processes that are really stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megarl import train as module
from megarl.config import load_config
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


def test_a_rank_is_not_late_before_its_first_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had waited since the host's start, and the watch looked for who is missing."""
    monkeypatch.setattr(trace, "_entered", ("", 0.0, 0.0))
    watch = StallWatch(tmp_path, 0, 1, stall_s=0.1 + time.monotonic() / 2)
    watch.close()
    assert not watch._late() and trace.entered()[0] == "the start"


def test_a_process_id_of_another_container_is_nobodys_here(tmp_path: Path) -> None:
    """Two containers of one host may share its name and the run's folder; a kill would reach some other process."""
    watch = StallWatch(tmp_path, 0, 3, stall_s=0)
    here = {"host": os.uname().nodename, "pid": 7, "pids": os.readlink("/proc/self/ns/pid")}
    assert watch._here({0: here, 1: here, 2: {**here, "pids": "pid:[1]"}}) == {1}


def test_the_start_of_a_run_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that hung in the load of the weights, on a file system that is away, ended with the groups' time-out."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10**11)
    seen: list[object] = []
    parallel = SimpleNamespace(coord=SimpleNamespace(rank=1), layout=SimpleNamespace(world=2))
    monkeypatch.setattr(module, "join_ranks", lambda config: parallel)
    monkeypatch.setattr(module, "StallWatch", lambda *watched: seen.append(watched))

    def builds(*args: object, **kwargs: object) -> None:
        seen.append(trace.entered()[::2])
        raise InterruptedError

    monkeypatch.setattr(module, "build_engine", builds)
    with pytest.raises(InterruptedError):
        module.train(load_config(None, [f"model.path={tmp_path}", f"run.dir={tmp_path}", "launch.stall_s=60"]))
    assert seen == [(tmp_path / "logs", 1, 2, 60), ("the load of the weights", 1000.0)]


SLEEPS = "import time\nprint('ready', flush=True)\ntime.sleep(600)\n"
JOINED = """
import sys
from pathlib import Path
from megarl.launch.joined import run_joined

def sleeps():
    import slow

run_joined(Path(sys.argv[1]), None, "127.0.0.1", sleeps, lambda: 0)
"""


@pytest.mark.parametrize("start", [["-m", "megarl.launch.rank"], ["-c", JOINED]], ids=["megarl run", "torchrun"])
def test_a_rank_that_only_begins_writes_its_stacks_when_it_is_asked(tmp_path: Path, start: list[str]) -> None:
    """While it imported, loaded or waited for workers, and always with launch.stall_s 0, the signal ended it."""
    (tmp_path / "slow.py").write_text(SLEEPS)
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, *start, str(tmp_path / "logs"), "slow"]
    with (
        (tmp_path / "err").open("wb") as err,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=err, text=True) as rank,
    ):
        try:
            assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
            rank.send_signal(signal.SIGUSR2)
            outs, until = (tmp_path / "err", tmp_path / "logs" / "trainer_0.log"), time.monotonic() + 60
            while not any("slow.py" in out.read_text() for out in outs if out.exists()):
                assert time.monotonic() < until and rank.poll() is None
                time.sleep(0.02)
        finally:
            rank.kill()
