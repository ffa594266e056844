"""Objectives that need more than the policy, and batches that are not fit to learn from, through the real trainer and the real vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import DP2, Bench
from tests.e2e.test_loop import configuration

# Call by call of one worker: step 1 (128 samples) has one that raises, in step 2 and its refill all are equal, then it is digit_sum.
REWARD = """
calls = 0
def staged(response, answer, prompt):
    global calls
    calls += 1
    if calls == 5: raise RuntimeError("disk full")
    return 0.25 if 128 < calls <= 384 else float(response.strip()[-1:] == answer)
"""


def test_ppo_with_kl_and_entropy_resumes_its_critic(bench: Bench, cold: Path) -> None:
    config = configuration(
        bench,
        cold,
        DP2,
        objective={"preset": "ppo", "kl_coef": 0.01, "entropy_coef": 0.001},
        critic={"lr": 1e-3, "warmup_steps": 1},
        replay={"mode": "none"},
        run={"save_every": 1, "keep": 1},
    )
    config["batch"]["minibatches"] = 2
    config["train"]["steps"] = 2
    bench.finish("run", "ppo", config)
    config["train"]["steps"] = 3
    again = bench.finish("run", "ppo", config)
    assert "resuming after step 2\n" in again.out
    rows = bench.rows("ppo")
    assert [row["version/weights"] for row in rows] == [0, 2, 4]  # the first step is the critic's alone
    assert rows[0].get("loss/value") is None and rows[0]["mismatch/kl_k3"] <= 1e-9
    for row in rows:
        assert row["critic/grad_norm"] > 0 and row["critic/lr"] > 0 and row["sync/canary_max_diff"] <= 1e-4
    assert rows[0]["critic/value_mean"] == 0  # a head of zeros
    assert rows[1]["policy/kl_reference"] < rows[2]["policy/kl_reference"]  # the resumed reference is still the start
    assert rows[2]["critic/value_mean"] != 0 and (bench.folder / "ppo" / "checkpoints" / "step_3" / "critic").is_dir()


def test_bad_samples_and_dull_batches_are_skipped_and_counted(bench: Bench, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench.folder / "staged_rewards.py").write_text(REWARD)
    monkeypatch.setenv("PYTHONPATH", str(bench.folder), prepend=":")
    data: dict[str, Any] = {"reward": "staged_rewards.staged", "reward_workers": 1, "overlong_buffer": 2, "overlong_penalty": 0.0}
    config = configuration(bench, cold, {})
    config["data"] |= data
    config["batch"] |= {"equal_groups": "refill", "max_refills": 1, "mask_truncated": True}
    config["train"] |= {"steps": 3, "on_bad_batch": "skip"}
    del config["eval"]
    command = bench.finish("run", "staged", config)
    rows = bench.rows("staged")
    assert [row["version/weights"] for row in rows] == [0, 0, 1]
    assert [row["batch/bad_samples"] for row in rows] == [1, 0, 0]
    assert [row["batch/groups"] for row in rows[:2]] == [0, 0] and 0 < rows[2]["batch/groups"] <= 16
    assert rows[1]["batch/refilled_groups"] == 16 and rows[1]["batch/equal_groups"] == 32
    assert rows[1]["reward/mean"] == 0.25 and rows[2]["optim/grad_norm"] > 0
    assert "step 1: no update, 1 samples are bad, the first: response 4 to the prompt on line " in command.out
    assert "data.reward 'staged_rewards.staged' raised RuntimeError: disk full" in command.out
    assert "step 2: nothing to learn, in each of 32 groups all rewards are equal; no update" in command.out

    config["train"]["on_bad_batch"] = "stop"
    command = bench.start("run", "stopped", config)
    assert command.wait() == 2
    assert command.err.startswith("megarl: error: step 1: response 4 to the prompt on line ") and command.err.count("megarl: error: ") == 1
    assert "raised RuntimeError: disk full; mend it, or leave such steps out by train.on_bad_batch=skip" in command.err
    assert command.processes() == {} and bench.rows("stopped") == []
