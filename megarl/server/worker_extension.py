"""Methods that every worker of a megarl server has, on any device: `--worker-extension-cls
megarl.server.worker_extension.WorkerExtension`.

The steps of a sync return what went wrong, in one line, instead of raising: with several workers behind one engine vLLM
reads no further answers after the first exception, and the next call would find the rest of this one's.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megarl.server.weight_receiver import WeightReceiver

LOG = logging.getLogger("vllm.megarl")


class WorkerExtension:
    model_runner: Any
    vllm_config: Any
    weight_transfer_engine: WeightReceiver

    def moe_layers(self) -> list[int]:
        """Which transformer layers have experts, in global order: vLLM reports routes for all layers."""
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        return sorted(
            {module.layer_id for module in self.model_runner.get_model().modules() if isinstance(module, MoERunner)}
        )

    def sync_init(self, init: dict[str, Any], remember_disk: bool) -> str | None:
        def step(engine: WeightReceiver) -> None:
            engine.init_transfer_engine(engine.parse_init_info(init))
            if remember_disk:
                engine.remember_disk()

        return self._sync_step(step)

    def sync_receive(self) -> str | None:
        """Staged: receives and checks. Else begins the update, and loads what arrives as it arrives."""

        def step(engine: WeightReceiver) -> None:
            if engine.staged:
                engine.stage()
            else:
                engine.start_weight_update()
                engine.update_weights({})

        return self._sync_step(step)

    def sync_load(self) -> str | None:
        def step(engine: WeightReceiver) -> None:
            if engine.staged:
                engine.start_weight_update()
                engine.update_weights({})
            engine.finish_weight_update()
            self.model_runner.reset_lora_state()

        return self._sync_step(step)

    def sync_remembers(self) -> bool:
        """Whether check(None) can be answered: not by a worker that came to a run and outlived its trainers."""
        receiver: WeightReceiver = self.weight_transfer_engine
        return receiver.remembers

    def sync_agreeing(self) -> list[str]:
        receiver: WeightReceiver = self.weight_transfer_engine
        return receiver.agreeing

    def sync_check(self, folder: str | None) -> str | None:
        def step(engine: WeightReceiver) -> None:
            if names := engine.check(folder):
                where = "the folder vLLM started with" if folder is None else folder
                raise RuntimeError(
                    f"weight sync: rollout rank {engine.rank} does not hold what an engine loaded from {where} holds: "
                    f"{len(names)} weights differ, first {', '.join(names[:3])}"
                )

        return self._sync_step(step)

    def _sync_step(self, step: Any) -> str | None:
        from vllm.config import set_current_vllm_config

        try:
            with set_current_vllm_config(self.vllm_config):
                step(self.weight_transfer_engine)
        except Exception as error:
            LOG.exception("a step of a weight sync failed")
            return " ".join(str(error).split()) or type(error).__name__
        return None
