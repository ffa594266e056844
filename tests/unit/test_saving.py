"""When a run is saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarl.config import load_config
from megarl.loop import saving
from megarl.observe import trace


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "ranks"), 1), rank=0, world_size=1)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(saving.time, "monotonic", lambda: clock.now)
    yield clock
    dist.destroy_process_group()


@pytest.mark.parametrize("keys, saved", [([], [6, 9, 10]), (["run.save_every=4"], [4, 7, 8, 10])])
def test_by_steps_by_minutes_and_at_the_end(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys: list[str], saved: list[int]
) -> None:
    """A step takes 25 s, so that a minute is over with the third; steps before the fourth are of another run."""
    began: list[int] = []

    def begin(engine: object, folder: Path, step: int, *rest: object) -> Any:
        began.append(step)
        return SimpleNamespace(failed=False, running=False, finish=lambda: None, wait=lambda _: None, within_s=0.0)

    monkeypatch.setattr(saving, "begin_checkpoint", begin)
    config = load_config(None, ["run.save_every_minutes=1", f"run.dir={tmp_path}", *keys])
    parallel = SimpleNamespace(device=SimpleNamespace(device=torch.device("cpu")))
    engine: Any = SimpleNamespace(model=SimpleNamespace(parallel=parallel))
    saver = saving.Saver(config, engine, None)
    for step in range(4, 11):
        clock.now += 25
        if saver.due(step, {}, last=step == 10):
            saver.save()
    saver.close()
    assert began == saved


def test_the_wait_for_a_checkpoint_is_no_stall_while_its_bytes_may_take_it(clock: SimpleNamespace) -> None:
    """3.3 TB at 1.5 GB/s took longer than launch.stall_s: the run was killed while it wrote, again and again."""
    waited: list[tuple[str, float]] = []
    saver = saving.Saver(load_config(None, []), SimpleNamespace(), None)  # type: ignore[arg-type]
    saver._writing = SimpleNamespace(within_s=7200.0, finish=lambda: waited.append(trace.entered()[::2]))  # type: ignore
    saver.finish()
    saver.close()
    assert waited == [("checkpoint_end", 7200.0)]
