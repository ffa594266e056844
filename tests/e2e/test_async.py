"""Rollouts that overlap training, with real engines under DP2: the bound on lag, versions to the token, and that a kill
loses no prompt.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from megarl.observe.trace import read_trace
from tests.e2e.conftest import DP2, Bench

STEPS, PROMPTS, GROUP = 8, 8, 4


def prompts_of(run_dir: Path, steps: range) -> Counter[str]:
    """How often each prompt was learnt from, by the samples that rank 0 keeps, of its replica, which may have none:
    the first groups that end make a batch.
    """
    files = [run_dir / "rollouts" / f"step_{step:06}.json" for step in steps]
    files = [file for file in files if file.exists()]
    return Counter(sample["prompt"] for file in files for sample in json.loads(file.read_text())["samples"])


def test_one_step_off_with_a_kill_in_between(bench: Bench, cold: Path) -> None:
    config: dict[str, Any] = {
        **DP2,
        "model": {"path": str(cold)},
        "data": {"prompts": str(bench.folder / "data" / "train.jsonl"), "reward": "digit_sum", "shuffle": False},
        "batch": {"prompts": PROMPTS, "group": GROUP, "minibatches": 2},
        "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 9, "max_lag": 2},
        "replay": {"mode": "R3"},
        "train": {"steps": STEPS, "lr": 5e-4},
        "run": {"save_every": 3, "rollout_samples": PROMPTS * GROUP},
    }
    run_dir = bench.folder / "async"
    first = bench.start("run", "async", config)
    whole = run_dir / "checkpoints" / "step_3" / "megarl.json"  # written behind the steps
    first.wait_until(lambda: len(bench.rows("async")) >= 4 and whole.exists(), "step 4 and the checkpoint of step 3")
    first.kill_everything()
    state = json.loads(whole.read_text())
    assert len(state["stream"]["returned"]) == PROMPTS  # the batch ahead, drawn and not trained
    again = bench.finish("run", "async", config)
    assert f"{PROMPTS} prompts drawn and not trained before: sampled again\n" in again.out

    spans = {
        name: [(e["ts"], e["ts"] + e["dur"]) for e in read_trace(run_dir) if e["name"] == name]
        for name in ("update", "canary")
    }
    # beside the gradients, before the optimizer's step
    assert any(begun <= at and end <= done for begun, done in spans["update"] for at, end in spans["canary"])

    rows = bench.rows("async")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    lags = [row["async/lag_max"] for row in rows]
    assert lags[0] == 0 and set(lags) == {0, 2}  # 0 also where a batch ahead had no token before the sync
    assert all(row["async/dropped_groups"] == 0 for row in rows)
    for row in rows:
        assert row["routing/missing_rows"] == 0 and row["sync/canary_max_diff"] <= 1e-4
        mismatch = row["async/mismatch_k3_by_lag"]
        # Of the tokens whose weights are those of now. Where a response began before the sync, the trainer replays the
        # routes of its first tokens as older weights gave them, and the engine has computed them anew.
        assert len(mismatch) == 2 and mismatch[0] < (1e-9 if row["async/spans_per_response"] == 1 else 1e-3)
    lines = (bench.folder / "data" / "train.jsonl").read_text().splitlines()[: (STEPS + 1) * PROMPTS]
    order = [json.loads(line)["prompt"] for line in lines]
    learnt = prompts_of(run_dir, range(1, STEPS + 1))
    assert learnt and set(learnt) <= set(order) and set(learnt.values()) == {GROUP}
