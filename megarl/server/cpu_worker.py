"""The vLLM worker of a CPU rollout: `--worker-cls megarl.server.cpu_worker.RolloutWorker`."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker import cpu_worker  # first: vLLM asks for it
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from megarl.server.plugin import end_with_parent
from megarl.server.vllm_capture import RouteCapture


class RolloutRunner(CPUModelRunner):
    """vLLM's CPU model runner; where routes are wanted, its AuxOutput connector is driven around each step."""

    _routes: RouteCapture | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if self.vllm_config.aux_output_config.enabled:
            self._routes = RouteCapture(self.model, self.vllm_config)

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        if is_profiling:
            return
        for cache in self.kv_caches:
            cache.zero_()  # takes the memory now: it would otherwise come page by page and look like a leak
        if self._routes is not None:
            self._routes.connect(kv_cache_config)

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        if self._routes is None:
            return super().execute_model(scheduler_output, intermediate_tensors)
        self._routes.begin(scheduler_output)
        output = super().execute_model(scheduler_output, intermediate_tensors)
        self._routes.ran(scheduler_output, self.input_batch)
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        if self._routes is not None:
            self._routes.end(output)
        return output


class RolloutWorker(cpu_worker.CPUWorker):
    def init_device(self) -> None:
        end_with_parent()  # a forked engine loads no plugins
        original, cpu_worker.CPUModelRunner = cpu_worker.CPUModelRunner, RolloutRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = original
