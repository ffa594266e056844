"""What happens when something dies: the trainers are told in time, and no process is left."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megarl.door import header
from megarl.launch.lifeline import descendants
from megarl.rollout import patience, registry
from megarl.rollout.client import RolloutClient, Server, answering
from megarl.rollout.members import Members
from megarl.rollout.registry import RolloutDied, RolloutError, ServerLost, WorkerInfo
from megarl.rollout.wire import decode
from tests.engine.support import START_S, prompts, supervised
from tests.engine.test_rollout import assert_judged


def ends(pids: list[int], within_s: float) -> bool:
    """Whether all processes are gone, zombies counted as gone."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def hangs(worker: WorkerInfo, within_s: float = 60.0) -> bool:
    """Whether the server does not say that it is alive; it may take a moment to notice that a sync was given up."""
    alive = urllib.request.Request(f"{worker.url}/megarl/alive", headers=header(worker.tokens.control))
    deadline = time.monotonic() + within_s
    while True:
        try:
            urllib.request.urlopen(alive, timeout=3).close()
        except TimeoutError:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def test_failed_syncs_and_a_killed_supervisor(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers, from their first answer to their end: both loaded,
    one killed while it receives, the other frozen, kill -9.
    """
    weights = load_file(checkpoints[0] / "model.safetensors")
    with supervised(checkpoints[0], tmp_path, engines=2) as rollout:
        assert rollout.client.weight_versions() == [0, 0]
        for checkpoint in (checkpoints[0], checkpoints[1]):
            groups = rollout.client.generate(prompts(3, 8), 2, 1.0, 8, [])
            assert [group[0].tokens[:8].tolist() for group in groups] == prompts(3, 8)
            assert_judged(groups, checkpoint)
            if checkpoint == checkpoints[0]:
                rollout.load(checkpoints[1])
        assert rollout.client.weight_versions() == [1, 1]

        assert rollout.pusher is not None
        rollout.fault("die_receiving", worker=1)
        with pytest.raises(RolloutError, match=rf"^rollout server {rollout.workers[1].url}\S+: \S") as caught:
            rollout.pusher.push(weights, 2)
        assert "\n" not in str(caught.value)
        with pytest.raises(RolloutDied, match=r"rollout worker 1 "):
            registry.check_workers(rollout.store, rollout.workers, wait_s=60)
        survivor = RolloutClient([rollout.workers[0]], 60)
        assert survivor.weight_versions() == [1]
        assert_judged(survivor.generate(prompts(3, 8), 2, 1.0, 8, []), checkpoints[1])
        (dead,) = (s for s in rollout.supervisors if rollout.workers[0].pid not in descendants(s.pid))
        assert dead.wait(60) == 1
        rollout.supervisors.remove(dead)
        rollout.workers = rollout.workers[:1]

        pusher = rollout.connect(checkpoints[0], 15)
        (supervisor,) = rollout.supervisors
        below = descendants(supervisor.pid)
        engine = next(pid for pid in below if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(engine, signal.SIGSTOP)
        with pytest.raises(
            RolloutError,
            match=f"no answer within 15 s.*{rollout.workers[0].url}|{rollout.workers[0].url}.*no answer within 15 s",
        ):
            pusher.push(weights, 3)
        assert hangs(rollout.workers[0]), "the sync is over"
        asking = threading.Thread(target=answering, args=[rollout.workers])
        asking.start()
        time.sleep(0.5)
        assert hangs(rollout.workers[0], within_s=0.0), "a question for its version is no sync"
        asking.join()
        os.kill(engine, signal.SIGCONT)

        supervisor.kill()
        assert ends([supervisor.pid, *below], within_s=60)
        registry.check_workers(rollout.store, rollout.workers)
        monkeypatch.setattr(patience, "STALE_S", 2.5)
        members, index = Members(rollout.store), rollout.workers[0].index
        deadline = time.monotonic() + 30
        while index not in (gone := members.look().gone):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert re.search(r"rollout worker 0 .* has been silent for", gone[index])
        rollout.workers = []


def test_an_engine_that_is_told_to_end_gives_no_part_of_a_response(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    """On SIGTERM vLLM answers what runs, and what comes then, with what it has sampled."""
    with supervised(checkpoints[0], tmp_path) as rollout:
        (worker,), (supervisor,) = rollout.workers, rollout.supervisors
        below = descendants(supervisor.pid)
        engine = next(pid for pid in below if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())
        server, sampling = Server(worker.url, 60, worker.tokens.data), {"n": 8, "max_tokens": 32, "ignore_eos": True}
        ends = threading.Timer(1.0, os.kill, [engine, signal.SIGTERM])
        ends.start()
        with pytest.raises(ServerLost):
            while True:
                body = server.post("/megarl/generate", {"prompts": prompts(16, 8), "sampling": sampling, "seeds": None})
                assert set(decode(body)[0]["finish"]) == {"length"}
        assert supervisor.wait(60) == 1
        rollout.workers = []


def test_a_server_that_cannot_start_says_why(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoints[0].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with supervised(broken, tmp_path / "run", wait=False) as rollout:
        with pytest.raises(
            RolloutDied, match=r"ended with status 1: ValueError: .*model\.norm\.weight.*; last lines of"
        ):
            registry.wait_for_workers(rollout.store, 1, START_S)
        assert rollout.supervisors[0].wait(60) == 1
