"""When the policy is evaluated, and that a run ended between a checkpoint and its evaluation makes up for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megarl.config import load_config
from megarl.loop import evaluate
from megarl.loop.evaluate import Evaluation
from megarl.observe.metrics import MetricsLogger, read_metrics

FOUND = {"eval/k": 2.0, "eval/mean_at_k": 0.5}


@pytest.fixture(autouse=True)
def world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_an_evaluation_is_part_of_its_steps_row_also_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: FOUND)
    config = load_config(None, [f"run.dir={tmp_path}", "eval.every=2", "train.steps=5"])

    def sitting(resumed: int, steps: range, killed: bool = False) -> None:
        logger = MetricsLogger(tmp_path, [], resumed)
        output: Any = SimpleNamespace(evaluated=logger.amend)
        asks: Any = SimpleNamespace(parallel=SimpleNamespace(host_group=None))
        evaluation = Evaluation(config, asks, None, ["a prompt"], output)  # type: ignore[arg-type, list-item]
        evaluation.catch_up(resumed)
        for step in steps:
            logger.log(step, {"reward/mean": step / 10})
            if not (killed and step == steps[-1]):
                evaluation.after(step, last=step == 5)
        logger.close()

    sitting(0, range(1, 5), killed=True)  # the row and the checkpoint of step 4 are there, its evaluation is not
    assert "eval/k" not in read_metrics(tmp_path)[-1]
    sitting(4, range(5, 6))
    sitting(3, range(4, 6))  # nothing is owed: step 3 has no evaluation
    want = [{"step": step, "reward/mean": step / 10, **(FOUND if step in (2, 4, 5) else {})} for step in range(1, 6)]
    assert read_metrics(tmp_path) == want
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
