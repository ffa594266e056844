"""GPUs as they are counted, given out and missed; and what else only a GPU could show, asked of fake CUDA tensors."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megarl import refusals
from megarl.config import Config, load_config
from megarl.engine import background, build, device, parallel, profile, specs
from megarl.engine.device import Device
from megarl.engine.parallel import Parallel
from megarl.errors import UserError
from megarl.launch import gpus, kv_cache, processes
from megarl.loop import reduce
from megarl.rollout.patience import longest_wait_s, resuming_s
from megarl.server import supervise
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap, load_hf_config

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
        gpus.refuse_lost_gpu(None)


def test_a_rank_whose_torch_the_driver_is_too_old_for_does_not_compute_on_the_cpu(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun nothing names GPUs to the ranks; rollout workers that a person starts have none named either."""
    host(8)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    driver = type("libcuda", (), {"cuDriverGetVersion": lambda _, version: setattr(version._obj, "value", 12040)})()
    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda name: driver)
    said = r"a GPU and a driver for CUDA up to 12\.4, but torch .*, built for CUDA 13\.0, sees no GPU; .*(empty)"
    for start in (device.setup_device, lambda: supervise.server_environment(Config(), "127.0.0.1")):
        with pytest.raises(UserError, match=said):
            start()
    host(8, "")
    assert device.setup_device().device.type == "cpu"


def test_a_container_for_gpus_that_has_none_was_started_wrongly(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host(0)
    monkeypatch.setattr(gpus, "DRIVER", Path("/nowhere"))
    assert not gpus.has_gpu()
    text = (EXAMPLES.parent / "Dockerfile").read_text()
    assert re.search(rf"^ENV .*\b{gpus.MEANT}=1$", text, re.M)
    monkeypatch.setenv(gpus.MEANT, "1")
    for start in (gpus.has_gpu, device.setup_device):
        with pytest.raises(
            UserError, match=r"no NVIDIA driver; start it with --gpus all, or set CUDA_VISIBLE_DEVICES= "
        ):
            start()
    monkeypatch.setenv(gpus.VISIBLE, "")
    assert not gpus.has_gpu()


def test_a_start_says_what_it_computes_on(run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Before the ranks meet, which a wrong device may keep them from; and they meet with the time-out of this run."""

    def meet(*given: Any) -> None:
        assert timedelta(hours=2) < given[-1] == parallel.group_timeout(config)
        raise InterruptedError

    monkeypatch.setattr(build, "init_parallel", meet)
    config = load_config(run_yaml, ["rollout.request_timeout_s=7200"])
    with pytest.raises(InterruptedError):
        build.build_engine(config)
    assert capfd.readouterr().out == "computing on CPU, gloo, in float32\n"


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert device.setup_device().backend == "nccl"
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(UserError, match="NVIDIA_TF32_OVERRIDE=1 .*; unset it"):
        device.setup_device()
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    assert supervise.server_environment(Config(), "127.0.0.1")["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] == "0"


@pytest.mark.parametrize(("dtype", "taken"), [("auto", True), ("bfloat16", True), ("float32", False)])
def test_float32_takes_local_layers(monkeypatch: pytest.MonkeyPatch, dtype: str, taken: bool) -> None:
    monkeypatch.setattr(profile, "has_transformer_engine", lambda: True)
    engine = load_config(None, [f"engine.dtype={dtype}"]).engine
    assert profile.choose_profile(engine, GPU).transformer_engine == taken


def test_a_fusion_that_has_run_nowhere_is_not_turned_on_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """NGC's images hold Apex."""
    monkeypatch.setattr(profile.importlib.util, "find_spec", lambda name: object())
    chosen = profile.choose_profile(load_config(None, []).engine, GPU)
    assert chosen.transformer_engine and not specs.profile_settings(chosen)["gradient_accumulation_fusion"]


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
    longest = max(longest_wait_s(config.rollout.request_timeout_s), 2 * config.rollout.start_timeout_s)
    assert timeout > timedelta(seconds=longest)
    assert timeout >= timedelta(seconds=config.launch.stall_s + 300)  # a stall's line comes before


def test_a_group_outlasts_what_servers_may_take_to_read_an_export(tmp_path: Path) -> None:
    """Of 235 billion parameters: 4,700 s."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(470 * 10**9)
    timeout = parallel.group_timeout(load_config(None, [f"model.path={tmp_path}", "sync.timeout_s=120"]))
    assert timeout > timedelta(seconds=4700 + 120)


def test_a_group_outlasts_what_ranks_may_take_to_read_a_checkpoint(tmp_path: Path) -> None:
    (folder := tmp_path / "checkpoints" / "step_5").mkdir(parents=True)
    (folder / "megarl.json").write_text(json.dumps({"files": {"__0_0.distcp": [10**11, "a checksum"]}}))
    timeout = parallel.group_timeout(load_config(None, [f"run.dir={tmp_path}"]))
    assert timeout > timedelta(seconds=resuming_s(folder, 1)) > timedelta(hours=5)


def test_the_writers_of_a_checkpoint_wait_for_the_slowest_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(background, "_group", (object(), None))
    monkeypatch.setattr(background.dist, "new_group", lambda **given: asked.update(given))
    background.writers_group()
    assert asked["timeout"] > timedelta(days=1)


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


def test_the_bound_of_connecting_holds_where_ranks_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's default group connects nobody: gloo's beside it is the first, before megatron-core makes its many."""
    done: list[str] = []

    @contextmanager
    def connecting() -> Iterator[None]:
        yield
        done.append("connected")

    monkeypatch.setattr(parallel, "connecting", connecting)
    monkeypatch.setattr(parallel, "_host", (object(), None))
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *_, **__: done.append("default"))
    monkeypatch.setattr(parallel.parallel_state, "initialize_model_parallel", lambda **_: done.append("megatron"))
    monkeypatch.setattr(parallel.dist, "new_group", lambda **given: done.append(given["backend"]))
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(parallel, "model_parallel_cuda_manual_seed", lambda *_, **__: None)
    for variable in ("RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(variable, "0")
    parallel.init_parallel(Config().parallel, GPU, 0)
    assert done == ["default", "gloo", "connected", "megatron"]


def test_sums_of_a_stage_travel_as_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled, a CUDA tensor makes a context on one GPU for every rank that reads it."""
    layout, seen = Layout(tp=1, pp=2, vpp=1, ep=1, etp=1, cp=1, world=2), list[Any]()
    monkeypatch.setattr(reduce.dist, "broadcast_object_list", lambda objects, src, group: seen.extend(objects))
    with FakeTensorMode():
        sums = {"loss": torch.zeros((), device="cuda"), "ratio:max": torch.zeros((), device="cuda")}
        reduce.reduce_sums(Parallel(layout, layout.coord(1), GPU), sums)
    assert [value.device.type for value in seen[0].values()] == ["cpu", "cpu"]


def shared_gpu(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    for module in (refusals.gpu, refusals.server):
        monkeypatch.setattr(module, "has_gpu", lambda: True)
    for module in (refusals.server, supervise):
        monkeypatch.setattr(module, "gpu_bytes", lambda: int(gib * 2**30))
    monkeypatch.setattr(supervise.torch.cuda, "is_available", lambda: True)


COLOCATED = ["launch.colocate=true", "rollout.engines=4", "rollout.max_new_tokens=1900"]


def test_a_shared_gpu_gives_the_cache_what_both_engines_leave(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default was a CPU's 0.25 GiB, which holds no usual length."""
    shared_gpu(monkeypatch, 80)
    config = load_config(run_yaml, COLOCATED)
    refusals.check(config)
    command = supervise.server_command(config, "127.0.0.1", 1)
    size = int(command[command.index("--kv-cache-memory-bytes") + 1])
    request = kv_cache.request_bytes(config, WeightMap(load_hf_config(config.model.path)).model, True)
    assert size == config.rollout.max_num_seqs * request < 0.85 * 80 * 2**30


def test_a_shared_gpu_that_is_too_small_is_refused(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_gpu(monkeypatch, 7)
    with pytest.raises(UserError, match=r"0\.85 \(.*\) of a GPU of 7 GiB leaves 0 GiB beside"):
        refusals.check(load_config(run_yaml, COLOCATED))


def test_what_a_cpu_needs_is_not_asked_of_a_gpu(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(run_yaml, ["rollout.quantization=fp8"])
    on_cpu, eager = supervise.server_command(config, "127.0.0.1", 1), {"--enforce-eager", "--no-enable-chunked-prefill"}
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert "glibc.malloc.hugetlb" in supervise.server_environment(config, "127.0.0.1")["GLIBC_TUNABLES"]
    monkeypatch.setattr(supervise.torch.cuda, "is_available", lambda: True)
    on_gpu = supervise.server_command(config, "127.0.0.1", 1)
    assert eager <= set(on_cpu) and not eager & set(on_gpu)
    assert "TORCHDYNAMO_DISABLE" not in supervise.server_environment(config, "127.0.0.1").keys() - os.environ.keys()
    assert on_gpu[on_gpu.index("--quantization") + 1] == "fp8_per_tensor"
    asked = load_config(run_yaml, ["rollout.enforce_eager=true"])
    assert "--enforce-eager" in supervise.server_command(asked, "127.0.0.1", 1)


def test_nothing_deprecated_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = type("spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(supervise.importlib.util, "find_spec", lambda name: vllm)
    assert supervise.api_server() == "vllm.entrypoints.openai.api_server"
    newer = tmp_path / "entrypoints" / "launchers" / "api_server"
    newer.mkdir(parents=True)
    (newer / "entry.py").touch()
    assert supervise.api_server() == "vllm.entrypoints.launchers.api_server.entry"


@pytest.mark.parametrize("module", ["plugin", "weight_receiver", "vllm_reload", "worker_extension", "endpoints"])
def test_a_gpu_never_imports_what_repairs_the_cpu_build(module: str) -> None:
    """Importing it would reach into files that a CUDA build may not have."""
    tree = ast.parse((Path(refusals.__file__).parents[1] / "server" / f"{module}.py").read_text())
    names = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert "megarl.server.vllm_patches" not in names


def test_no_copy_to_a_gpu_holds_up_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """From pageable memory the host waits for it, however it is asked."""
    calls: list[str] = []

    class Host:
        device = torch.device("cpu")

        def pin_memory(self) -> Host:
            calls.append("pinned")
            return self

        def to(self, where: torch.device, non_blocking: bool = False) -> Host:
            calls.append(f"to {where.type}, non_blocking {non_blocking}")
            return self

    device.to_device(Host(), GPU.device)  # type: ignore[arg-type]
    assert calls == ["pinned", "to cuda, non_blocking True"]
