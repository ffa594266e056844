"""What a checkpoint takes beside the states: megarl plan's figure against what megatron-core gathers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megarl.config import load_config
from megarl.engine.build import build_engine
from megarl.engine.checkpoint import _sharded
from megarl.engine.parallel import destroy_parallel
from megarl.estimate.cluster import training_of
from megarl.estimate.memory import stage_memory
from tools.tiny_model import make_tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    yield make_tiny_model(tmp_path / "model")
    destroy_parallel()


@pytest.mark.parametrize("distributed", [False, True])
def test_a_save_gathers_what_the_plan_counts(model: Path, monkeypatch: pytest.MonkeyPatch, distributed: bool) -> None:
    config = load_config(None, [f"model.path={model}", f"engine.distributed_optimizer={str(distributed).lower()}"])
    engine = build_engine(config, optimizer_steps=2)
    gathered, gather = [0], dist.all_gather  # bytes of one call: what is sent and what comes, on the device

    def noted(into: list[Any], part: Any, *args: Any, **kwargs: Any) -> Any:
        gathered.append(sum(tensor.nbytes for tensor in [*into, part]))
        return gather(into, part, *args, **kwargs)

    monkeypatch.setattr(dist, "all_gather", noted)
    _sharded(engine, loading=False)
    layout = engine.model.parallel.layout
    planned = stage_memory(engine.model.weight_map, training_of(config, layout, 4), 0)
    assert planned.save == pytest.approx(max(gathered), rel=0.01)  # buffers are padded
