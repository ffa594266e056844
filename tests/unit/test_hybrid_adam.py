"""Adam in host memory (engine.optimizer_offload_fraction): megatron-core's HybridDeviceOptimizer, run on a CPU, where
the host's share are copies as beside a device. Its steps are Adam's, its checkpoints those of every optimizer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tools.bench.gpu.common import packs_of
from tools.bench.gpu.correctness import _loss
from tools.tiny_model import make_tiny_model

# isort: split
from megarl import refusals
from megarl.config import load_config
from megarl.engine.adam_state import parts_of
from megarl.engine.build import Engine, build_engine
from megarl.engine.checkpoint import load_checkpoint, save_checkpoint
from megarl.engine.hybrid_adam import HybridAdam, stepping
from megarl.engine.offload import TrainingMemory
from megarl.errors import UserError

LR = 1e-3


pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("hybrid") / "model", layers=1)


def engine_of(model: Path, fraction: float) -> Engine:
    keys = [f"model.path={model}", "engine.dtype=bfloat16", f"train.lr={LR}", "train.weight_decay=0.1"]
    offload = ["engine.distributed_optimizer=true", f"engine.optimizer_offload_fraction={fraction}"]
    return build_engine(load_config(None, [*keys, *offload]), optimizer_steps=6)


def update(engine: Engine, steps: int = 1) -> None:
    for _ in range(steps):
        engine.update(packs_of(engine, 64, 32), "off", _loss)


def state(engine: Engine) -> dict[str, Tensor]:
    """Master weights, moments and steps, by the optimizer's order of parameters, and the model's weights."""
    held = {f"weight {param.chunk}.{param.name}": tensor.detach() for param, tensor in engine.model.params()}
    for number, part in enumerate(parts_of(engine.optimizer)):
        for g, group in enumerate(part.optimizer.param_groups):
            for i, param in enumerate(group["params"]):
                of_param = part.optimizer.state[param]
                of_param = {"master_param": param, **of_param}
                held |= {f"{name} {number}.{g}.{i}": of_param[name].detach() for name in of_param}
    return {name: tensor.clone() for name, tensor in held.items()}


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_its_steps_are_those_of_adam(model: Path, fraction: float) -> None:
    """To the last digits: the host's kernel rounds in another order."""
    plain, hybrid = engine_of(model, 0), engine_of(model, fraction)
    parts = [part.optimizer for part in parts_of(hybrid.optimizer)]
    assert all(isinstance(part, HybridAdam) for part in parts)
    assert any(part.gpu_optimizer is not None for part in parts) == (fraction < 1)
    update(plain, 3), update(hybrid, 3)
    want, got = state(plain), state(hybrid)
    assert want.keys() == got.keys()
    for name in (name for name in want if not name.startswith("weight")):
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6 * LR, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("source", [1.0, 0.0])
def test_the_step_after_a_resume_is_that_of_the_run_that_went_on(model: Path, tmp_path: Path, source: float) -> None:
    """Bit for bit; and either optimizer reads what the other has written."""
    one = engine_of(model, source)
    update(one, 2)
    saved = state(one)
    whole = save_checkpoint(one, tmp_path, 2, {"optimizer_steps": 2}, keep=1)
    update(one)
    for fraction in (1.0 - source, source):
        engine = engine_of(model, fraction)
        assert load_checkpoint(engine, whole)["optimizer_steps"] == 2
        got = state(engine)
        wrong = [name for name in saved if not torch.equal(saved[name], got[name])]
        assert not wrong and saved.keys() == got.keys(), wrong[:3]
    update(engine)
    want, got = state(one), state(engine)
    wrong = [name for name in want if not torch.equal(want[name], got[name])]
    assert not wrong, wrong[:3]
    for part in parts_of(engine.optimizer):
        for optimizer in stepping(part.optimizer):
            for kept in optimizer.state.values():  # no view of a whole tensor of the checkpoint
                assert all(kept[name].untyped_storage().nbytes() == kept[name].nbytes for name in ("exp_avg", "step"))


def test_before_the_first_step_it_is_saved(model: Path, tmp_path: Path) -> None:
    one = engine_of(model, 1.0)
    whole = save_checkpoint(one, tmp_path, 1, {"optimizer_steps": 0}, keep=1)
    again = engine_of(model, 1.0)
    load_checkpoint(again, whole)
    update(one), update(again)
    want, got = state(one), state(again)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_nothing_is_copied_for_the_whole_parameters_that_megatron_core_makes_it_of_first(model: Path) -> None:
    made = HybridAdam([torch.nn.Parameter(torch.ones(4))], offload_fraction=1.0, cpu_optimizer_cls=torch.optim.AdamW)
    assert made.sub_optimizers == []


def test_its_memory_takes_turns_too(model: Path) -> None:
    plain, turned = engine_of(model, 1.0), engine_of(model, 1.0)
    memory = TrainingMemory([turned])
    for _ in range(2):
        memory.release()
        memory.restore()
        update(turned)
    update(plain, 2)
    want, got = state(plain), state(turned)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_where_it_cannot_work_it_is_refused(run_yaml: Path) -> None:
    keys = ["engine.optimizer_offload_fraction=1"]
    with pytest.raises(UserError, match="set engine.distributed_optimizer=true"):
        refusals.check(load_config(run_yaml, [*keys, "engine.dtype=bfloat16"]))
    keys.append("engine.distributed_optimizer=true")
    with pytest.raises(UserError, match="engine.dtype auto: a float32 parameter .* set engine.dtype=bfloat16"):
        refusals.check(load_config(run_yaml, keys))
    refusals.check(load_config(run_yaml, keys), "plan")
    refusals.check(load_config(run_yaml, [*keys, "engine.dtype=bfloat16"]))
