"""Rewards of one's own run in worker processes: what raises, hangs, dies or is not a
number costs its own sample only.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megarl.config import DataConfig
from megarl.errors import UserError
from megarl.reward import RewardInput
from megarl.reward.pool import RewardPool, Score, Scorer, try_reward

REWARDS = """
import os, subprocess, sys, time
def wild(response, prompt):
    print("noise on standard output")
    if response == "hang": time.sleep(60)
    if response == "close": os.closerange(3, 100); time.sleep(60)
    if response == "die": os._exit(3)
    if response == "raise": raise ValueError("no\\nsuch thing")
    if response == "read": return len(sys.stdin.read())
    if response == "child": return subprocess.Popen(["sleep", "60"]).pid
    if response.startswith("session"):
        pid = subprocess.Popen(["sleep", "60"], start_new_session=True).pid
        open("pid", "w").write(str(pid))
        if response == "session": return pid
        time.sleep(60)
    if response == "secrets": return sum(key in os.environ for key in ("A_KEY", "A_TOKEN", "PATH"))
    return {"nan": float("nan"), "text": "much", "long": len(prompt)}.get(response, 0.5)
def of_a_row(response, level): return level
"""


def samples(*responses: str, prompt: str = "", **row: object) -> list[RewardInput]:
    return [RewardInput(response, "answer", prompt, row=row) for response in responses]


@pytest.fixture(autouse=True)
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wild_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    )


@pytest.fixture
def pool() -> Iterator[RewardPool]:
    pool = RewardPool("wild_rewards.wild", workers=2, timeout_s=2.0)
    yield pool
    pool.close()


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    for _ in range(1000):
        if not alive(pid):
            return True
        time.sleep(0.01)
    return False


def test_a_fault_belongs_to_its_sample(pool: RewardPool) -> None:
    given = samples("fine", "raise", "hang", "nan", "die", "fine", "text", "long", "read", prompt="p" * 300_000)
    found = pool.score(given)
    values, faults = [value for value, _ in found], [fault for _, fault in found]
    assert values[0] == values[5] == 0.5 and values[7] == 300_000 and values[8] == 0
    assert [i for i, fault in enumerate(faults) if not fault] == [0, 5, 7, 8]
    assert all(math.isnan(values[i]) for i in (1, 2, 3, 4, 6))
    assert faults[1] == "data.reward 'wild_rewards.wild' raised ValueError: no such thing"
    assert faults[2] == "data.reward 'wild_rewards.wild' took longer than data.reward_timeout_s 2"
    assert "gave nan for response 'nan'" in faults[3] and "gave 'much' for response 'text'" in faults[6]
    assert faults[4] == "data.reward 'wild_rewards.wild' ended its process (status 3)"
    pids = [worker.process.pid for worker in pool.workers]
    assert pool.score(samples("fine")) == [(0.5, "")]  # those that were lost have been replaced
    pool.close()
    assert not any(alive(pid) for pid in pids)


def test_fault_16_the_first_fault_is_enough_where_the_run_stops(pool: RewardPool) -> None:
    found = pool.score(samples(*["hang"] * 20), stop_at_first=True)
    late = "data.reward 'wild_rewards.wild' took longer than data.reward_timeout_s 2"
    assert 1 <= [fault for _, fault in found].count(late) <= 2
    assert pool.score(samples("fine", "fine")) == [(0.5, "")] * 2  # nothing of those before is mistaken for these


def test_fault_16_a_worker_that_closes_its_output_is_not_waited_for(pool: RewardPool) -> None:
    [score] = pool.score(samples("close"))
    assert score.fault == "data.reward 'wild_rewards.wild' closed the output of its process"


@pytest.mark.parametrize("kind", ["child", "session"])
def test_fault_16_what_a_reward_starts_ends_with_its_worker(pool: RewardPool, kind: str) -> None:
    [score] = pool.score(samples(kind))
    assert alive(int(score.value))
    pool.close()
    assert ends(int(score.value))


def test_what_a_reward_starts_in_a_session_of_its_own_ends_with_its_time(pool: RewardPool, tmp_path: Path) -> None:
    [score] = pool.score(samples("session and hang"))
    assert "took longer" in score.fault and ends(int((tmp_path / "pid").read_text()))


def test_a_worker_that_died_while_idle_costs_no_sample() -> None:
    pool = RewardPool("wild_rewards.wild", workers=1, timeout_s=20)
    assert pool.score(samples("fine")) == [(0.5, "")]
    os.kill(pool.workers[0].process.pid, signal.SIGKILL)
    assert pool.workers[0].has_exited(within_s=20)
    assert pool.score(samples("fine", "fine")) == [(0.5, "")] * 2
    pool.close()


def test_fault_16_a_reward_sees_no_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "1")
    monkeypatch.setenv("A_TOKEN", "1")
    data = DataConfig(reward="wild_rewards.wild")
    assert try_reward(data, samples("secrets")[0]) == 1  # PATH
    assert try_reward(data.model_copy(update={"reward_env": ["A_KEY"]}), samples("secrets")[0]) == 2


def test_fault_08_a_row_that_lacks_what_a_reward_asks_for_is_a_fault_of_its_sample() -> None:
    pool = RewardPool("wild_rewards.of_a_row", workers=1, timeout_s=20)
    found = pool.score([*samples("a", level=3), *samples("b", other=1), *samples("c", level=4)])
    pool.close()
    assert [found[0], found[2]] == [Score(3.0), Score(4.0)]
    assert "the parameter 'level'" in found[1].fault and "key of the row (other)" in found[1].fault


def test_a_reward_that_cannot_be_imported_is_an_error() -> None:
    pool = RewardPool("no_such_module.reward", workers=1, timeout_s=2.0)
    with pytest.raises(UserError, match="data.reward 'no_such_module.reward': importing 'no_such_module' failed"):
        pool.score(samples("a"))
    pool.close()


def test_a_worker_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text("import os\nos._exit(1)\n")
    with pytest.raises(UserError, match="'dying.reward': its worker process could not start"):
        try_reward(DataConfig(reward="dying.reward"), samples("a")[0])


def test_fast_rewards_stay_here_and_math_verify_does_not() -> None:
    scorer = Scorer(DataConfig(reward="exact_match"))
    given = [RewardInput(response, "1", "", response) for response in ("1", "2")]
    assert scorer.score(given) == [(1.0, ""), (0.0, "")] and scorer._pool is None
    scorer.close()
    scorer = Scorer(DataConfig(reward="math_verify", reward_workers=1, reward_timeout_s=60))
    given = [RewardInput("", "0.5", "", "\\boxed{2/4}"), RewardInput("", "4", "", "3")]
    assert scorer.score(given) == [(1.0, ""), (0.0, "")]
    scorer.close()
