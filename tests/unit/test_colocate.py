"""Taking turns with the memory (launch.colocate), on Megatron's real
buffers and optimizers: what is released, and that nothing changes.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tools.bench.gpu.common import TINY, engine_of, packs_of  # sets the device up before megatron-core is imported
from tools.bench.gpu.correctness import _loss

# isort: split
from megarl import refusals
from megarl.config import load_config
from megarl.engine.adam_state import parts_of
from megarl.engine.offload import TrainingMemory
from megarl.errors import UserError
from megarl.launch import gpus, processes
from megarl.loop.colocate import MemoryTurns
from megarl.rollout import fleet as fleet_module
from megarl.rollout.fleet import Fleet
from megarl.server import supervise

KINDS = [(dtype, distributed) for dtype in ("float32", "bfloat16") for distributed in (False, True)]


pytestmark = pytest.mark.usefixtures("world")


def trained(dtype, distributed, memory=False):
    """(engine, its log-probabilities after two steps); with `memory`,
    what training needs is away before, between and after them.
    """
    _, engine = engine_of(
        TINY, [f"engine.dtype={dtype}", f"engine.distributed_optimizer={distributed}", "train.lr=1e-2"], train=True
    )
    packs = packs_of(engine, 64, 32)
    turns = TrainingMemory([engine]) if memory else None
    for _ in range(2):
        if turns:
            turns.release()
            engine.logprobs(packs, "off")
            turns.restore()
        engine.update(packs, "off", _loss)
    if turns:
        turns.release()
    return engine, engine.logprobs(packs, "off")[0][0], turns


@pytest.mark.parametrize(("dtype", "distributed"), KINDS)
def test_updates_are_bitwise_those_of_a_trainer_that_keeps_its_memory(dtype, distributed):
    """And log-probabilities are computed while the memory is away."""
    plain, wanted, _ = trained(dtype, distributed)
    engine, found, turns = trained(dtype, distributed, memory=True)
    assert torch.equal(found, wanted)
    turns.restore()
    for (param, got), (_, want) in zip(engine.model.params(), plain.model.params(), strict=True):
        assert torch.equal(got, want), param.name
    for got, want in zip(states(engine), states(plain), strict=True):
        assert torch.equal(got, want)


def states(engine):
    for part in parts_of(engine.optimizer):
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                yield master
                yield from (part.optimizer.state[master][key] for key in ("exp_avg", "exp_avg_sq", "step"))


@pytest.mark.parametrize(("dtype", "distributed"), KINDS)
def test_what_is_released_is_all_that_only_training_needs(dtype, distributed):
    engine, _, _ = trained(dtype, distributed, memory=True)
    size = lambda tensor: tensor.untyped_storage().nbytes()
    weights = {tensor.untyped_storage()._cdata for _, tensor in engine.model.params()}
    for param, tensor in engine.model.params():
        assert size(tensor) > 0 and size(tensor.main_grad) == 0, param.name
    for tensor in states(engine):
        own = tensor.untyped_storage()._cdata in weights  # a float32 parameter is its own master weight
        assert (size(tensor) > 0) == own and own <= (dtype == "float32")


def test_gradient_buffers_come_back_as_zeros():
    engine, _, turns = trained("float32", True, memory=True)
    turns.restore()
    for _, tensor in engine.model.params():
        assert not tensor.main_grad.any()


class Recorder:
    """In place of the fleet and of the memory: what is asked of them, in order."""

    def __init__(self):
        self.calls = []

    def turn(self, step):
        self.calls.append(step)

    def release(self):
        self.calls.append("release")

    def restore(self):
        self.calls.append("restore")


def test_the_two_never_hold_their_memory_together():
    recorder = Recorder()
    turns = MemoryTurns(load_config(None, []), [])
    turns._memory = recorder
    with turns.training(recorder):
        recorder.calls.append("train")
    assert recorder.calls == ["sleep", "restore", "train", "release", "wake"]
    with pytest.raises(ZeroDivisionError), turns.training(recorder):
        1 / 0  # noqa: B018
    assert recorder.calls[5:] == ["sleep", "restore"], "after a failure nobody is woken"


def test_a_server_is_woken_when_every_rank_has_released_its_memory(monkeypatch):
    """Rank 0 asks the servers; the memory that they take belongs to other ranks too. None touches its GPU meanwhile:
    vLLM's sleep fails where another process takes memory of the device, which an NCCL barrier may do.
    """
    recorder = Recorder()
    monkeypatch.setattr(fleet_module.dist, "barrier", lambda group: recorder.calls.append(group))
    monkeypatch.setattr(fleet_module, "idle", lambda device: recorder.calls.append("idle"))
    fleet = object.__new__(Fleet)
    fleet._leader, fleet._store, fleet.workers, fleet._device = recorder, None, [], torch.device("cpu")
    fleet._hosts = "hosts"
    fleet.turn("wake")
    assert recorder.calls == ["idle", "hosts", "wake", "hosts"]


def test_without_the_key_nothing_happens():
    turns = MemoryTurns(load_config(None, []), [])
    with turns.training(None):
        pass


@pytest.mark.parametrize(
    ("command", "overrides", "gpu", "says"),
    [
        ("train", [], True, ["launch.colocate true", "megarl run", "not megarl train"]),
        ("run", [], False, ["launch.colocate true needs a GPU", "launch.colocate=false"]),
        (
            "run",
            ["rollout.engines=3"],
            True,
            ["engines 3 x tp 1 is not launch.trainers 4", "rollout.engines=4 or launch.trainers=3"],
        ),
        ("run", ["rollout.engines=2", "rollout.tp=2"], True, []),
        ("rollout", [], False, []),  # what megarl run starts: the whole was judged before
        ("run", ["rollout.engines=4"], True, []),
        (
            "run",
            ["rollout.engines=4", "sync.staged=true"],
            True,
            ["a second copy of the weights", "leave sync.staged unset"],
        ),
    ],
)
def test_where_it_cannot_work(run_yaml: Path, monkeypatch, command, overrides, gpu, says):
    monkeypatch.setattr(refusals.gpu, "has_gpu", lambda: gpu)
    config = load_config(run_yaml, ["launch.colocate=true", "launch.store=127.0.0.1:29999", *overrides])
    with pytest.raises(UserError) if says else nullcontext() as error:
        refusals.check(config, command)
    for words in says:
        assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_that_cannot_be_shared(run_yaml: Path, monkeypatch, name):
    monkeypatch.setattr(refusals.gpu, "has_gpu", lambda: True)
    monkeypatch.setenv(name, "expandable_segments:True")
    with pytest.raises(UserError, match=f"{name} expandable_segments:True cannot be shared; unset it"):
        refusals.check(load_config(run_yaml, ["launch.colocate=true", "rollout.engines=4"]))


def test_each_worker_sees_the_gpu_of_its_trainer_rank(run_yaml: Path, monkeypatch):
    """A machine of two GPUs."""
    monkeypatch.setattr(processes, "has_gpu", lambda: True)
    monkeypatch.setattr(gpus, "driver_devices", lambda: (2, ""))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    keys = ["launch.trainers=2", "rollout.engines=2"]
    made = processes.make_plan("run", "m", load_config(run_yaml, [*keys, "launch.colocate=true"]), [str(run_yaml)])
    assert made.trainer.env["CUDA_VISIBLE_DEVICES"] == "4,7"
    assert [worker.env["CUDA_VISIBLE_DEVICES"] for worker in made.rollouts] == ["4", "7"]
    with pytest.raises(UserError, match="need 4 GPUs, this host has 2"):
        processes.make_plan("run", "m", load_config(run_yaml, keys), [str(run_yaml)])


def test_the_server_is_started_with_sleep_and_a_cache_of_given_size(run_yaml: Path, monkeypatch):
    monkeypatch.setattr(supervise.torch.cuda, "is_available", lambda: True)
    command = supervise.server_command(
        load_config(run_yaml, ["launch.colocate=true", "rollout.kv_cache_gib=8"]), "127.0.0.1", 1
    )
    assert "--enable-sleep-mode" in command and command[command.index("--kv-cache-memory-bytes") + 1] == str(8 * 2**30)
    assert "--enable-sleep-mode" not in supervise.server_command(load_config(run_yaml), "127.0.0.1", 1)
