"""A checkpoint before the first optimizer step, as of a run whose first batches taught nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megarl.config import load_config
from megarl.engine.build import build_engine
from tools.bench.gpu.common import packs_of
from tools.bench.gpu.correctness import _loss
from tools.tiny_model import make_tiny_model

# isort: split
from megarl.engine.checkpoint import load_checkpoint, save_checkpoint
from megarl.engine.parallel import destroy_parallel


@pytest.fixture(scope="module", autouse=True)
def world():
    yield
    destroy_parallel()


@pytest.mark.parametrize("distributed", [False, True])
def test_it_is_saved_and_the_run_goes_on_from_it(tmp_path: Path, distributed: bool) -> None:
    path = make_tiny_model(tmp_path / "model", layers=1)
    config = load_config(None, [f"model.path={path}", f"engine.distributed_optimizer={distributed}", "train.lr=1e-2"])
    engine = build_engine(config, optimizer_steps=4)
    whole = save_checkpoint(engine, tmp_path / "run", 2, {"optimizer_steps": 0}, keep=1)
    again = build_engine(config, optimizer_steps=4)
    assert load_checkpoint(again, whole)["optimizer_steps"] == 0
    for one in (engine, again):
        one.update(packs_of(one, 64, 32), "off", _loss)
        one.update(packs_of(one, 64, 32), "off", _loss)
    for (param, want), (_, got) in zip(engine.model.params(), again.model.params(), strict=True):
        assert torch.equal(got, want), param.name
