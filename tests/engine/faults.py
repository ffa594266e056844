"""What goes wrong inside a vLLM worker, at a test's word: the worker
extension of the servers that tests start (POST /collective_rpc).
"""

from __future__ import annotations

import inspect
import os
import signal
from typing import Any

from torch import Tensor

from megarl.server.worker_extension import WorkerExtension


class FaultyExtension(WorkerExtension):
    """WorkerExtension, fault(), which arms one fault until the next sync_init, and parameter_sizes()."""

    def parameter_sizes(self) -> dict[str, int]:
        """Elements of every parameter as vLLM made it, before a backend laid it out in its own way."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        layers = self.model_runner.get_model().named_modules()
        made = ((layer, get_layerwise_info(module).restore_metadata[0]) for layer, module in layers)
        return {f"{layer}.{name}": tensor.numel() for layer, tensors in made for name, tensor in tensors.items()}

    def sync_init(self, init: dict[str, Any], remember_disk: bool) -> str | None:
        self.fault("none")
        return super().sync_init(init, remember_disk)

    def fault(self, kind: str, name: str = "") -> None:
        """flip: one bit of tensor `name` on arrival. die_receiving,
        die_loading: kill -9 of this process; fail_loading: half is loaded.

        no_prepack: vLLM's in-place update as it is without our patch. came_late: as a worker that came to a run
        which had begun, whose weights at its start nobody noted. no_second_model: another model cannot be made.
        zero_expert: an expert of layer 2 is lost after the load. no_walk: vLLM's own loader raises.
        """
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
            UnquantizedFusedMoEMethod as Method,
        )

        from megarl.server import vllm_patches, vllm_reload, weight_receiver
        from megarl.weights.reshard.pack import assemble

        weight_receiver.assemble = _tampered(assemble, kind, name) if kind in ("flip", "die_receiving") else assemble
        engine = self.weight_transfer_engine
        engine.__dict__.pop("_load", None)
        engine.model.__dict__.pop("load_weights", None)
        if kind == "came_late":
            engine._disk = engine._held_check = None
        if kind in ("die_loading", "fail_loading"):
            engine._load = _half_loaded(engine._load, kind)
        weight_receiver.fingerprint_of_folder = (
            _no_room if kind == "no_second_model" else vllm_reload.fingerprint_of_folder
        )
        weight_receiver.finalize_layerwise_reload = _losing_an_expert if kind == "zero_expert" else _finalized
        if kind == "no_walk":
            engine.model.load_weights = _refused
        if kind == "no_prepack":
            Method._setup_kernel = inspect.getclosurevars(Method._setup_kernel).nonlocals["original"]
        else:
            vllm_patches.apply()

    def resumed_requests(self) -> int:
        """How often a preempted request was taken up again since the first call, which begins to count."""
        runner = self.model_runner
        if "execute_model" not in vars(runner):
            original, runner.resumed = runner.execute_model, 0

            def execute_model(scheduler_output: Any, *args: Any) -> Any:
                runner.resumed += len(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
                return original(scheduler_output, *args)

            runner.execute_model = execute_model
        return runner.resumed


def _tampered(assemble: Any, kind: str, name: str) -> Any:
    def call(bucket: Any, buffers: list[Tensor], manifest: Any) -> dict[str, Tensor]:
        if kind == "die_receiving":
            os.kill(os.getpid(), signal.SIGKILL)
        for message, buffer in zip(bucket, buffers):
            if name in (each.hf_name for each in message.slices):
                values = assemble([message], [buffer], manifest)
                values[name].view(-1)[3:4].view(dtype=_int(values[name])).bitwise_xor_(1)  # a view of the buffer
        return assemble(bucket, buffers, manifest)

    return call


def _losing_an_expert(model: Any, model_config: Any) -> None:
    _finalized(model, model_config)
    (experts,) = (p for name, p in model.named_parameters() if "layers.2." in name and name.endswith("w2_weight"))
    experts.data[3] = 0


def _finalized(model: Any, model_config: Any) -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)


def _no_room(*args: Any) -> Any:
    raise MemoryError("the test has no room for a second model")


def _int(tensor: Tensor) -> Any:
    import torch

    return {4: torch.int32, 2: torch.int16}[tensor.element_size()]


def _refused(tensors: Any) -> None:
    raise RuntimeError("vLLM's own loader was asked")


def _half_loaded(load: Any, kind: str) -> Any:
    def call(tensors: dict[str, Tensor]) -> None:
        load(dict(list(tensors.items())[: len(tensors) // 2]))
        if kind == "die_loading":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the test ended this load half way")

    return call
