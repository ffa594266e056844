"""Rewards of one's own run in worker processes: what raises, hangs, dies or is not a
number costs its own sample only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megarl.config import DataConfig
from megarl.errors import UserError
from megarl.reward.pool import RewardPool, Scorer

REWARDS = """
import os, time
def wild(response, answer, prompt):
    print("noise on standard output")
    if response == "hang": time.sleep(60)
    if response == "die": os._exit(3)
    if response == "raise": raise ValueError("no\\nsuch thing")
    return {"nan": float("nan"), "text": "much", "long": len(prompt)}.get(response, 0.5)
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardPool]:
    (tmp_path / "wild_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    pool = RewardPool("wild_rewards.wild", workers=2, timeout_s=2.0)
    yield pool
    pool.close()


def test_a_fault_belongs_to_its_sample(pool: RewardPool) -> None:
    responses = ["fine", "raise", "hang", "nan", "die", "fine", "text", "long"]
    found = pool.score([(response, "answer", "p" * 300_000) for response in responses])
    values, faults = [value for value, _ in found], [fault for _, fault in found]
    assert values[0] == values[5] == 0.5 and values[7] == 300_000 and faults[0] == faults[5] == faults[7] == ""
    assert all(math.isnan(values[i]) for i in (1, 2, 3, 4, 6))
    assert faults[1] == "data.reward 'wild_rewards.wild' raised ValueError: no such thing"
    assert faults[2] == "data.reward 'wild_rewards.wild' took longer than data.reward_timeout_s 2"
    assert "gave nan for prompt" in faults[3] and "gave 'much' for prompt" in faults[6]
    assert faults[4] == "data.reward 'wild_rewards.wild' ended its process (status 3)"
    pids = [worker.process.pid for worker in pool.workers]
    assert pool.score([("fine", "", "")]) == [(0.5, "")]  # those that were lost have been replaced
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_worker_that_cannot_start_is_an_error() -> None:
    pool = RewardPool("no_such_module.reward", workers=1, timeout_s=2.0)
    with pytest.raises(UserError, match="'no_such_module.reward': its worker process could not start"):
        pool.score([("a", "b", "c")])
    pool.close()


def test_fast_rewards_stay_here_and_math_verify_does_not() -> None:
    scorer = Scorer(DataConfig(reward="exact_match"))
    assert scorer.score([("1", "1", ""), ("2", "1", "")]) == [(1.0, ""), (0.0, "")] and scorer._pool is None
    scorer.close()
    scorer = Scorer(DataConfig(reward="math_verify", reward_workers=1, reward_timeout_s=60))
    assert scorer.score([("\\boxed{2/4}", "0.5", ""), ("3", "4", "")]) == [(1.0, ""), (0.0, "")]
    scorer.close()
