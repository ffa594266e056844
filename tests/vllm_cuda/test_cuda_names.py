"""What the rollout servers touch of vLLM, looked for in its CUDA build: names, signatures and the command line."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

import pytest
import torch

WORKER = "vllm.v1.worker.gpu_worker.Worker"


def test_the_plugin_leaves_what_is_for_cpus_alone() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from megarl.server import plugin, vllm_release

    assert vllm_release.missing_names(on_a_cpu=False) == []
    plugin.register()
    for name in ("worker", "worker_extension", "weight_receiver", "endpoints", "vllm_reload"):
        importlib.import_module(f"megarl.server.{name}")
    assert plugin.BACKEND in WeightTransferEngineFactory._registry
    assert "megarl.server.vllm_patches" not in sys.modules


@pytest.mark.parametrize(
    "keys",
    [
        ["replay.mode=R3"],
        ["replay.mode=none", "replay.metrics=false", "rollout.tp=4"],
        ["rollout.quantization=fp8", "rollout.kv_cache_dtype=fp8"],
        ["launch.colocate=true"],
        ["rollout.enforce_eager=true", "rollout.batch_invariant=true"],
    ],
    ids=["R3", "tp4", "fp8", "colocated", "eager"],
)
def test_vllm_takes_our_command_line(configured: Any, keys: list[str]) -> None:
    """create_engine_config also asks the platform, which refuses what its kernels cannot do."""
    config = configured(keys)
    routes = "replay.mode=none" not in keys
    assert config.parallel_config.worker_cls == WORKER
    assert config.aux_output_config.enable_return_routed_experts is routes
    assert config.use_v2_model_runner or not routes, "vLLM's other runner returns no routes"
    assert config.weight_transfer_config.backend == "megarl"
    assert config.model_config.enable_sleep_mode is ("launch.colocate=true" in keys)


def test_our_methods_are_put_below_vllms_worker() -> None:
    """vLLM asserts that no name is there already, and calls them by what the worker holds."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Second
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as First
    from vllm.v1.worker.gpu_worker import Worker

    from megarl.server.worker_extension import WorkerExtension

    ours = [name for name in dir(WorkerExtension) if not name.startswith("__")]
    assert not [name for name in ours if hasattr(Worker, name)]
    for runner in (First, Second):
        assert callable(runner.get_model) and callable(runner.reset_lora_state)
    held = inspect.getsource(Worker)
    for name in WorkerExtension.__annotations__.keys() - {"vllm_config"}:
        assert f"self.{name}" in held, name


def test_the_receiver_is_a_weight_transfer_engine(configured: Any) -> None:
    """Made as vLLM's worker makes it; what its worker calls of it takes what we take."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from megarl.server.weight_receiver import WeightReceiver

    config = configured(["replay.mode=R3"])
    model = torch.nn.Linear(2, 2)
    engine = WeightTransferEngineFactory.create_engine(
        config.weight_transfer_config, config, torch.device("cpu"), model
    )
    assert isinstance(engine, WeightReceiver) and not WeightReceiver.__abstractmethods__
    assert engine.model is model and engine.model_config is config.model_config
    for name, method in inspect.getmembers(WeightTransferEngine, inspect.isfunction):
        ours = getattr(WeightReceiver, name)
        assert name == "__init__" or [*inspect.signature(ours).parameters] == [*inspect.signature(method).parameters]
    engine.shutdown()


def test_a_reload_that_failed_is_mended_by_the_next(configured: Any) -> None:
    """vLLM's reload life cycle of this build, on a layer in host memory: half a load, then a whole one."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

    from megarl.server.vllm_reload import abandon_reload, fingerprint

    config = configured(["replay.mode=R3"])
    with set_current_vllm_config(config):
        model = torch.nn.ModuleDict({name: RMSNorm(4) for name in ("first", "second")})
        record_metadata_for_reloading(model)

        def load(names: list[str], value: float) -> None:
            for name in names:
                weight = model[name].weight
                weight.weight_loader(weight, torch.full((4,), value))

        initialize_layerwise_reload(model)
        load(["first"], 2.0)
        abandon_reload(model)
        initialize_layerwise_reload(model)
        load(["first", "second"], 3.0)
        finalize_layerwise_reload(model, config.model_config)
    assert all(torch.equal(layer.weight, torch.full((4,), 3.0)) for layer in model.values())
    assert fingerprint(model).keys() >= {"first.weight", "second.weight"}


def test_the_engine_answers_to_what_the_endpoints_ask() -> None:
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient

    asked: dict[str, dict[str, Any]] = {
        "resume_generation": {},
        "update_weight_version": {"new_version": "1"},
        "get_weight_version": {},
        "reset_prefix_cache": {"reset_running_requests": True},
        "collective_rpc": {"method": "sync_check", "args": (None,)},
        "sleep": {"level": 1},
        "wake_up": {},
    }
    for name, given in asked.items():
        inspect.signature(getattr(AsyncLLM, name)).bind(None, **given)
    assert [*inspect.signature(AsyncLLM.add_request).parameters][:3] == ["self", "request_id", "prompt"]
    inspect.signature(AsyncMPClient.pause_scheduler_async).bind(None, mode="keep", clear_cache=False)
    assert isinstance(AsyncLLM.errored, property)
    assert {"weight_versions", "routed_experts"} <= inspect.signature(CompletionOutput).parameters.keys()
    assert "num_cached_tokens" in inspect.signature(RequestOutput).parameters
    assert tokens_input([1], cache_salt="3")["cache_salt"] == "3"
    assert SamplingParams(logprobs=0, flat_logprobs=True, prompt_logprobs=0).flat_logprobs
