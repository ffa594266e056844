"""The arithmetic behind docs/paper.md: which runs there are, the
collapse criterion, intervals, verdicts, and the page as a whole.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megarl.config import Config  # noqa: E402
from megarl.errors import UserError  # noqa: E402
from megarl.refusals import check, server  # noqa: E402
from megarl.rollout.registry import WorkerInfo  # noqa: E402
from tools.grid import arms, claims, lane, results  # noqa: E402
from tools.grid.page import write_report  # noqa: E402

ON, NO_IS, LENGTH, ON_R3, NO_IS_R3, LENGTH_R3 = (
    arms.Arm(1, objective, replay, arms.COARSE) for replay in ("none", "R3") for objective in arms.ON_POLICY
)


def a_run(
    arm: arms.Arm, seed: int, reward: list[float], k3: list[float] | None = None, failure: str | None = None
) -> dict[str, Any]:
    record = {
        "arm": asdict(arm),
        "seed": seed,
        "steps": 64,
        "lr": 1e-3,
        "failure": failure,
        "wall_s": 1.0,
        "trainer_cpu_s": 2.0,
        "server_cpu_s": 3.0,
    }
    k3 = k3 or [1e-3] * len(reward)
    rows = [
        {
            "reward/mean": r,
            "mismatch/kl_k3": k,
            "policy/entropy": 1.0,
            "time/step_s": 1.0,
            "mismatch/extreme_frac_2": 0.1,
        }
        for r, k in zip(reward, k3)
    ]
    return results._run(record, rows)


def three_seeds(arm: arms.Arm, level: float, **kwargs: Any) -> list[dict[str, Any]]:
    return [a_run(arm, seed, [level + 0.01 * seed] * 16, **kwargs) for seed in range(3)]


def test_the_subset_is_what_the_claims_need() -> None:
    runs = arms.subset(3, 64)
    assert len({run.name for run in runs}) == len(runs)
    rl = [run for run in runs if run.arm.kind == "rl"]
    assert {run.seed for run in rl} == {0, 1, 2} and {run.arm.n for run in rl} == {1, 8}
    assert {run.arm for run in rl} >= {ON, NO_IS, LENGTH, ON_R3, NO_IS_R3, LENGTH_R3}
    names = {run.arm.name for run in arms.full(1, 64)}
    assert {run.arm.name for run in runs} <= names
    assert {
        (run.arm.n, run.arm.objective, run.arm.replay)
        for run in arms.full(1, 64)
        if run.arm.n > 1 and run.arm.kind == "rl"
    } == {(n, objective, replay) for n in (2, 4, 8) for objective in arms.OFF_POLICY for replay in ("none", "R2", "R3")}


def test_arms_of_a_seed_are_paired_and_their_mini_batches_equal(tmp_path: Path) -> None:
    seen: dict[int, set[str]] = {}
    for run in arms.subset(2, 64):
        config = run.config(tmp_path)
        assert config.batch.prompts // config.batch.minibatches == arms.PROMPTS and config.run.seed == run.seed
        assert config.replay_mode == run.arm.replay and config.sync.quantize == (
            "none" if run.arm.precision in ("fp32", *arms.OWN_SERVER) else run.arm.precision
        )
        seen.setdefault(run.arm.n, set()).add(config.data.prompts)
        if run.arm.kind == "rl":
            assert config.train.steps * config.batch.minibatches == 64
    assert all(len(files) == 1 for files in seen.values())


def test_another_rate_or_length_is_another_run() -> None:
    arm = arms.Arm(1, "minirl", "none", "int4")
    names = {
        arms.Run(arm, 0, 64).name,
        arms.Run(arm, 0, 320).name,
        arms.Run(dataclasses.replace(arm, lr=1e-2), 0, 64).name,
    }
    names |= {run.name for rates in ([1e-3], [2e-3]) for run in arms.sweep(rates, 64)}
    assert len(names) == 3 + 4 and f"n1-minirl-none-int4-lr{arms.base().train.lr:g}-t64-s0" in names


def test_a_lane_does_each_run_once_on_one_fleet_until_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trained = [], []

    class OneFleet(lane.LastingFleet):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(self)
            self.workers = [WorkerInfo(index=0, url="", tp=1, pid=os.getpgrp(), host="", log="")]

        def leave(self) -> None:
            pass

    def train(config: Config, connect: Any) -> None:
        connect(config, None, is_ingest=True, hosts=None)
        trained.append(Path(config.run.dir).name)
        (Path(config.run.dir) / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "reward/mean": 0.5, "time/step_s": 1.0}) + "\n"
        )
        if len(trained) == 2:
            raise UserError("the rate was too high")

    monkeypatch.setattr(lane, "LastingFleet", OneFleet)
    monkeypatch.setattr(lane, "train", train)
    runs = [arms.Run(arms.Arm(n, "minirl", "none", "int4"), 0, 8) for n in (1, 2, 4)]
    queue = tmp_path / "queue.json"
    queue.write_text(json.dumps([asdict(run) for run in runs]))

    def again(deadline: float) -> int:
        return lane.main([str(queue), str(tmp_path), str(deadline), str(arms.BASE), *runs[0].overrides(tmp_path)])

    assert again(time.time() - 1) == 0 and trained == []
    assert again(math.inf) == 3 and trained == [
        run.name for run in runs[:2]
    ]  # a failed run ends the lane: a fresh server for the next
    assert again(math.inf) == 0 and trained == [run.name for run in runs] and len(made) == 2
    records = [json.loads((tmp_path / "runs" / run.name / arms.RECORD).read_text()) for run in runs]
    assert [record["failure"] for record in records] == [None, "the rate was too high", None]
    assert records[1]["server_cpu_s"] is not None and all(record["lr"] == arms.base().train.lr for record in records)


def test_no_run_of_the_full_grid_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.tiny_model import make_tiny_model

    monkeypatch.setattr(server, "_cpu_flags", lambda: {"avx512f"})  # an fp8 cache asks for it

    for cold in arms.COLD_STARTS:
        make_tiny_model(tmp_path / "task" / cold, layers=1, hidden=32)
    (tmp_path / "task" / "train.jsonl").write_text('{"prompt": "1234567=", "answer": "8"}\n')
    for run in arms.full(1, 64):
        check(run.config(tmp_path), "run")


@pytest.mark.parametrize(
    ("rewards", "failed", "fell"),
    [
        ([0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6], False, False),
        ([0.2, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.41], False, False),
        ([0.2, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.39], False, True),
        ([0.5] * 8 + [0.6] * 48 + [0.1] * 8, False, True),
        ([0.0] * 8, False, False),
        ([0.5] * 8, True, True),
        ([], True, True),
        ([0.5, float("nan")], False, True),
    ],
)
def test_collapse(rewards: list[float], failed: bool, fell: bool) -> None:
    assert results.collapsed(rewards, failed) == fell


def test_eighths_cover_every_value_once() -> None:
    values = [float(i) for i in range(20)]
    parts = results.eighths(values)
    assert len(parts) == 8 and parts[0] == 0.5 and parts[-1] == 18.5 and results.eighths([1.0, 3.0]) == [1.0, 3.0]


def test_bootstrap() -> None:
    low, high = claims.bootstrap([0.1, 0.2, 0.3])
    assert 0.1 <= low < 0.14 and 0.26 < high <= 0.3
    assert claims.bootstrap([0.5, 0.5, 0.5]) == (0.5, 0.5)


def verdicts(runs: list[dict[str, Any]]) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in claims.claims({"runs": runs})}


def test_nothing_run_is_not_run() -> None:
    assert set(verdicts([]).values()) == {"not run"}


def test_a_world_as_in_the_paper_and_its_opposite() -> None:
    fall = {"k3": [1e-3] * 8 + [1e-1] * 8}
    down = [0.5] * 8 + [0.1] * 8

    def world(no_is: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return three_seeds(ON, 0.6) + three_seeds(LENGTH, 0.4) + no_is

    like = verdicts(world([a_run(NO_IS, seed, down, **fall) for seed in range(3)]))
    assert (like["C2"], like["C3"], like["C8"]) == (
        "not shown",
        "shown",
        "shown",
    )  # it collapsed, but its entropy did not fall
    unlike = verdicts(world(three_seeds(NO_IS, 0.6)))
    assert unlike["C2"] == "not shown" and unlike["C8"] == "undecided" and unlike["C1"] == "not shown"
    flat = verdicts(world([a_run(NO_IS, seed, down, k3=[1e-3] * 16) for seed in range(3)]))
    assert flat["C8"] == "not shown"
    assert {claim.verdict for claim in claims.claims({"runs": world([])}, "fp8_e4m3")} == {"not run"}
    two = verdicts([run for run in world([]) if run["seed"] < 2])
    assert two["C3"] == "undecided"


def test_signs_of_comparisons() -> None:
    judge = claims.Judge({"runs": three_seeds(ON, 0.50) + three_seeds(ON_R3, 0.51)})
    verdict = {sign: judge.compare("", ON_R3, ON, sign, claims.last, 0.03).verdict for sign in (">", "<", "<=", "=")}
    assert verdict == {">": "yes", "<": "no", "<=": "yes", "=": "yes"}
    verdict = {sign: judge.compare("", ON_R3, ON, sign, claims.last).verdict for sign in (">", "<", "<=", "=")}
    assert verdict == {">": "yes", "<": "no", "<=": "no", "=": "no"}


def test_the_page_from_run_directories_and_from_its_own_json(tmp_path: Path) -> None:
    out, docs = tmp_path / "out", tmp_path / "docs"
    for run in arms.subset(3, 64):
        folder = out / "runs" / run.name
        folder.mkdir(parents=True)
        record = {"arm": asdict(run.arm), "seed": run.seed, "steps": run.steps, "lr": run.lr, "failure": None}
        record |= {"wall_s": 9.0, "trainer_cpu_s": 2.0, "server_cpu_s": 3.0}
        (folder / arms.RECORD).write_text(json.dumps(record))
        keys = (
            "reward/mean",
            "mismatch/kl_k3",
            "mismatch/extreme_frac_2",
            "routing/agree_rollout_old",
            "policy/entropy",
            "time/step_s",
        )
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": i + 1, **dict.fromkeys(keys, 0.25)}) + "\n" for i in range(8))
        )
    other = arms.Run(ON, 0, 32)  # of another length: not in the report
    (out / "runs" / other.name).mkdir()
    record |= {"arm": asdict(other.arm), "steps": 32}
    (out / "runs" / other.name / arms.RECORD).write_text(json.dumps(record))
    assert write_report(out, docs, 64) == 0
    assert len(json.loads((docs / "paper" / "results.json").read_text())["runs"]) == len(arms.subset(3, 64))
    page = (docs / "paper.md").read_text()
    assert page.count("| **") == 8 and "not run" in page and "| int4 | 2.5e-01 | 2.5e-01 |" in page
    assert all((docs / "paper" / link).is_file() for link in ("on_reward.svg", "off_k3.svg", "results.json"))
    assert write_report(tmp_path / "absent", docs, 64) == 0
    assert (docs / "paper.md").read_text() == page
