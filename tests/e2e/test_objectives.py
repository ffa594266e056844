"""PPO with its critic, and a reward that fails, through the real
trainer and the real vLLM: stopped, named, resumed, skipped, counted.

Batches that teach nothing, refills, penalties and masks are in
tests/unit/test_loop_batch.py: the real sampler and trainer, a made-up vLLM.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.convert.commands import hf_to_megatron_main
from tests.e2e.conftest import DP2, Bench
from tests.e2e.test_loop import configuration

# One worker a replica, 64 samples a step and 16 an evaluation: the evaluation after the second step raises, and again,
# in the run that resumes there and makes up for it, the third step.
REWARD = """
from pathlib import Path
calls, before = 0, Path(__file__).with_name("stopped_before")
again = before.exists()
def failing(response, answer, prompt):
    global calls
    calls += 1
    if calls == (21 if again else 133):
        before.touch()
        raise RuntimeError("disk full")
    return float(response.strip()[-1:] == answer)
"""


def test_ppo_stops_at_a_failing_reward_and_resumes_its_critic(
    bench: Bench, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run starts from a Megatron checkpoint: vLLM begins on dummy
    weights, and the first sync's digests are those of an export.
    """
    converted = bench.folder / "cold_megatron"
    assert hf_to_megatron_main(["--hf", str(cold), "--out", str(converted)]) == 0
    (bench.folder / "failing_rewards.py").write_text(REWARD)
    monkeypatch.setenv("PYTHONPATH", str(bench.folder), prepend=":")
    config = configuration(
        bench,
        cold,
        DP2,
        objective={"preset": "ppo", "kl_coef": 0.01, "entropy_coef": 0.001},
        critic={"lr": 1e-3, "warmup_steps": 1},
        replay={"mode": "none"},
        run={"save_every": 1, "keep": 1},
        model={"path": str(converted)},
    )
    config["data"] |= {"reward": "failing_rewards.failing", "reward_workers": 1}
    config["batch"]["minibatches"] = 2
    config["train"]["steps"] = 4
    config["eval"]["every"] = 2
    command = bench.start("run", "ppo", config)
    assert command.wait() == 2 and command.processes() == {}
    assert command.err.startswith("megarl: error: evaluation, a response to the prompt on line ")
    assert command.err.count("megarl: error: ") == 1
    assert "raised RuntimeError: disk full; mend it, or leave such responses out by train.on_bad_batch=skip" in (
        command.err
    )
    rows = bench.rows("ppo")  # faults 9: the checkpoint and the row of a step do not wait for its evaluation
    assert len(rows) == 2 and "eval/mean_at_k" not in rows[1]
    assert [path.name for path in (bench.folder / "ppo" / "checkpoints").iterdir()] == ["step_2"]

    config["train"]["on_bad_batch"] = "skip"
    again = bench.finish("run", "ppo", config)
    assert "resuming after step 2\n" in again.out
    assert "step 3: no update, 2 samples are bad, the first: response " in again.out
    rows = bench.rows("ppo")
    assert rows[1]["eval/bad_samples"] == 0 and 0 <= rows[1]["eval/mean_at_k"] <= 1
    assert [row["version/weights"] for row in rows] == [
        0,
        2,
        2,
        4,
    ]  # the first step is the critic's alone, the third nobody's
    assert [row["batch/bad_samples"] for row in rows] == [0, 0, 2, 0]
    assert rows[3]["eval/bad_samples"] == 0 and 0 <= rows[3]["eval/mean_at_k"] <= 1
    assert rows[0].get("loss/value") is None and rows[0]["mismatch/kl_k3"] <= 1e-9
    for row in rows:
        assert row["sync/canary_max_diff"] <= 1e-4
    for row in (rows[0], rows[1], rows[3]):
        assert row["critic/grad_norm"] > 0 and row["critic/lr"] > 0
    assert rows[0]["critic/value_mean"] == 0  # a head of zeros
    assert rows[1]["policy/kl_reference"] < rows[3]["policy/kl_reference"]  # the resumed reference is still the start
    assert rows[3]["critic/value_mean"] != 0 and (bench.folder / "ppo" / "checkpoints" / "step_4" / "critic").is_dir()
