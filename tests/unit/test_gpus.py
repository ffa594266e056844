"""GPUs as they are counted, given out and missed; and what else only a GPU could show, asked of fake CUDA tensors."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megarl import refusals
from megarl.config import Config, load_config
from megarl.engine import device, parallel, profile
from megarl.engine.device import Device
from megarl.engine.parallel import Parallel
from megarl.errors import UserError
from megarl.launch import gpus, processes
from megarl.loop import reduce
from megarl.weights.map.layout import Layout

GPU = Device(torch.device("cuda", 0), "nccl")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A host with a driver and a CUDA build of torch, on which CUDA sees so many GPUs."""

    def of(count: int, visible: str | None = None) -> None:
        monkeypatch.setattr(gpus, "DRIVER", Path("/dev/null"))
        monkeypatch.setattr(gpus, "_cuda_build", lambda: True)
        monkeypatch.setattr(gpus, "driver_devices", lambda: (count, "CUDA's error 803"))
        monkeypatch.delenv(gpus.VISIBLE, raising=False)
        if visible is not None:
            monkeypatch.setenv(gpus.VISIBLE, visible)

    return of


def test_cuda_numbers_what_it_was_given_from_zero(host: Any) -> None:
    """A container that was given /dev/nvidia6 and /dev/nvidia10 has the GPUs 0 and 1."""
    host(12)
    assert gpus.gpu_names() == [str(n) for n in range(12)]
    host(2, "GPU-8a,GPU-31,GPU-77")
    assert gpus.gpu_names() == ["GPU-8a", "GPU-31"], "CUDA leaves off what it does not know"


def test_a_gpu_that_cuda_does_not_see_is_an_error_and_not_a_cpu(host: Any) -> None:
    host(0)
    with pytest.raises(UserError, match=r"has an NVIDIA driver, but CUDA sees no GPU \(CUDA's error 803\)"):
        gpus.has_gpu()
    host(0, "")
    assert not gpus.has_gpu()


def test_a_process_that_was_given_a_gpu_does_not_compute_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpus.VISIBLE, "3")
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES=3, but torch .* sees no GPU"):
        device.setup_device()
    for none in gpus.NONE:
        monkeypatch.setenv(gpus.VISIBLE, none)
        gpus.refuse_lost_gpu(False)


@pytest.mark.parametrize("command", processes.WITHOUT_ENGINE)
def test_a_rank_without_an_engine_needs_no_gpu(run_yaml: Path, host: Any, command: str) -> None:
    host(2)
    config = load_config(run_yaml, ["rollout.engines=2"])  # 4 trainer ranks
    made = processes.make_plan(command, "m", config, [str(run_yaml)])
    assert [worker.env[gpus.VISIBLE] for worker in made.rollouts] == ["0", "1"]
    with pytest.raises(UserError, match="need 6 GPUs, this host has 2"):
        processes.make_plan("run", "m", config, [str(run_yaml)])


def test_a_float32_product_is_float32_whatever_the_container_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 begins
    assert torch.backends.cuda.matmul.allow_tf32
    device.float32_means_float32()
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(UserError, match="NVIDIA_TF32_OVERRIDE=1 .*; unset it"):
        device.float32_means_float32()


@pytest.mark.parametrize(("dtype", "taken"), [("auto", True), ("bfloat16", True), ("float32", False)])
def test_float32_takes_local_layers(monkeypatch: pytest.MonkeyPatch, dtype: str, taken: bool) -> None:
    monkeypatch.setattr(profile, "has_transformer_engine", lambda: True)
    engine = load_config(None, [f"engine.dtype={dtype}"]).engine
    assert profile.choose_profile(engine, GPU).transformer_engine == taken


def test_float32_by_transformer_engine_is_refused(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals.gpu, "has_gpu", lambda: True)
    monkeypatch.setattr(refusals.gpu.importlib.util, "find_spec", lambda name: object())
    keys = ["engine.transformer_impl=transformer_engine", "engine.dtype=float32"]
    with pytest.raises(UserError, match="its float32 products are TF32"):
        refusals.check(load_config(run_yaml, keys))


@pytest.mark.parametrize("path", [None, *sorted((EXAMPLES / "multi_node").glob("qwen3_*.yaml"))])
def test_a_group_outlasts_the_longest_wait_for_rollouts(path: Path | None) -> None:
    config = load_config(path, [])
    timeout = parallel.group_timeout(config)
    assert timeout >= timedelta(minutes=30)
    assert timeout > timedelta(seconds=max(config.rollout.request_timeout_s, config.rollout.start_timeout_s))


def test_every_group_has_that_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: False)
    monkeypatch.delenv("RANK", raising=False)

    def initialize(**sizes: Any) -> None:
        asked.update(sizes)
        raise InterruptedError

    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *_, **given: asked.update(given))
    monkeypatch.setattr(parallel.parallel_state, "initialize_model_parallel", initialize)
    with pytest.raises(InterruptedError):
        parallel.init_parallel(Config().parallel, GPU, 0, timedelta(hours=2))
    assert asked["timeout"] == timedelta(hours=2) and asked["distributed_timeout_minutes"] == 120


def test_sums_of_a_stage_travel_as_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled, a CUDA tensor makes a context on one GPU for every rank that reads it."""
    layout, seen = Layout(tp=1, pp=2, vpp=1, ep=1, etp=1, cp=1, world=2), list[Any]()
    monkeypatch.setattr(reduce.dist, "broadcast_object_list", lambda objects, src: seen.extend(objects))
    with FakeTensorMode():
        sums = {"loss": torch.zeros((), device="cuda"), "ratio:max": torch.zeros((), device="cuda")}
        reduce.reduce_sums(Parallel(layout, layout.coord(1), GPU), sums)
    assert [value.device.type for value in seen[0].values()] == ["cpu", "cpu"]
