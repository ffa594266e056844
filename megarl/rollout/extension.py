"""Methods that every worker of a megarl server has, on any device: `--worker-extension-cls megarl.rollout.extension.WorkerExtension`."""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    model_runner: Any

    def moe_layers(self) -> list[int]:
        """Which transformer layers have experts, in global order: vLLM reports routes for all layers."""
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        return sorted({module.layer_id for module in self.model_runner.get_model().modules() if isinstance(module, MoERunner)})
