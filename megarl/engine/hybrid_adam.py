"""Adam in host memory (engine.optimizer_offload_fraction): megatron-core's HybridDeviceOptimizer, with what it lacks.

Float32 master weights and moments of a share of the parameters lie in host memory and are stepped there; gradients
travel to them and weights come back, one parameter after the other. Each rank so holds what the distributed optimizer
leaves it. Parameters are bfloat16: a float32 one is its own master weight, which megatron-core leaves out. Methods of
megatron-core 0.16 and 0.19 that are replaced begin with an underscore (optimizer/cpu_offloading/hybrid_optimizer.py).
Held by tests/unit/test_hybrid_adam.py and test_simulate.py; on a GPU not yet run.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

Groups = list[dict[str, Any]]


class HybridAdam(HybridDeviceOptimizer):
    def _init_sub_optimizers(self) -> None:
        """megarl's answer to DistributedOptimizer, which makes it twice: of whole parameters, which would all be copied
        to the host, and then of this rank's shards. Nothing is copied the first time.
        """
        if any(isinstance(param, torch.nn.Parameter) for group in self.param_groups for param in group["params"]):
            self.cpu_optimizers: list[torch.optim.Optimizer] = []
            self.gpu_optimizer = None
            return
        super()._init_sub_optimizers()

    def _get_sub_optimizer_param_groups(self, offload_fraction: float) -> tuple[Any, ...]:
        """What is stepped on the host and what on the device, master weights by parameter, and back. Where there is no
        device, which megatron-core does not foresee, the split and the copies are those that there would be.
        """
        if torch.cuda.is_available():
            return super()._get_sub_optimizer_param_groups(offload_fraction)
        left = offload_fraction * sum(param.numel() for group in self.param_groups for param in group["params"])
        on_host: dict[Tensor, Tensor] = {}
        masters: dict[Tensor, Tensor] = {}
        groups: tuple[Groups, Groups] = [], []
        for group in self.param_groups:
            parts: tuple[list[Tensor], list[Tensor]] = [], []
            for param in group["params"]:
                masters[param] = param.detach().to(torch.float32, copy=True)
                if left > 0:
                    on_host[param] = masters[param]
                parts[0 if left > 0 else 1].append(masters[param])
                left -= param.numel()
            for into, params in zip(groups, parts, strict=True):
                if params:
                    into.append({**group, "params": params})
        return *groups, on_host, {master: param for param, master in on_host.items()}, masters

    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        """What was loaded, into memory of its own beside its parameter. megatron-core keeps the views of whole tensors
        that it is given, and leaves the state of torch's Adam for a device on the host.
        """
        for optimizer in self.sub_optimizers:
            for group in optimizer.param_groups:
                for inner in group["params"]:
                    loaded = self.state[self.inner_param_to_orig_param[inner]]
                    inner.data.copy_(loaded["master_param"])
                    kept = {name: value for name, value in loaded.items() if name != "master_param"}
                    optimizer.state[inner] = {name: _beside(inner, value) for name, value in kept.items()}
        self._sync_sub_optimizers_state_to_hdo()


def _beside(param: Tensor, value: Any) -> Any:
    return value.detach().to(param.device, copy=True) if torch.is_tensor(value) else value


def install() -> None:
    """In this process, for every optimizer that megatron-core makes from here on."""
    for module in ("megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"):
        importlib.import_module(module).__dict__["HybridDeviceOptimizer"] = HybridAdam


def stepping(inner: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that step: of a HybridAdam its parts, whose parameters are the float32 ones."""
    return list(inner.sub_optimizers) if isinstance(inner, HybridAdam) else [inner]


def settle(inner: torch.optim.Optimizer) -> None:
    """After the state of its parts has changed: a HybridAdam shows it by the model's parameters."""
    if isinstance(inner, HybridAdam):
        inner._sync_sub_optimizers_state_to_hdo()
