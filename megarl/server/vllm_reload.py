"""Where the weight receiver reaches into vLLM's reload life cycle and
model loader: private names (vllm_release.py). tests/engine holds each.

On CUDA none of this has been run yet.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests

from megarl.server.partial import PartialTensor

PROBE_ROWS = 4


def abandon_reload(model: torch.nn.Module) -> None:
    """Ends a reload that failed half way: every layer has its tensors
    again, some old, some new. A whole reload may then begin.
    """
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            layerwise._place_kernel_tensors(layer, info)
            info.reset()
    layerwise.LOADING_LAYERS.clear()


class _Call(NamedTuple):
    """One call of a parameter's loader. kept: its arguments, those that are tensors left out; key: of the weight's."""

    parameter: str
    signature: inspect.Signature
    kept: OrderedDict[str, Any]
    key: str
    name: str  # of the tensor that it was given as it came; "" where it was another


@dataclasses.dataclass
class _LayerLoads:
    """What a reload did to one layer, in order. at_once: it was processed when it had everything, not at the end."""

    calls: list[_Call] = dataclasses.field(default_factory=list)
    numel: int = 0
    at_once: bool = False
    made: dict[str, tuple[torch.Size, torch.dtype]] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> dict[str, None]:
        return dict.fromkeys(call.name for call in self.calls)


class ReloadPlan:
    """Which tensor goes to which layer's loader: noted in one whole reload by vLLM's own loader, followed in the next.

    For every load vLLM walks all modules and asks each parameter's loader twice, the first time to count elements; that
    is most of a reload. The plan calls the loader once. A tensor that no loader got as it came (converted, cut, copied
    past the loaders) still goes through vLLM's own, with all others of its layers.
    """

    def __init__(self, model: torch.nn.Module, shards: Mapping[str, Any]) -> None:
        """shards: what every reload brings, by name."""
        self._model: Any = model
        self._shards = dict(shards)
        self._layers: dict[torch.nn.Module, _LayerLoads] = {}
        self._of_name: dict[str, list[torch.nn.Module]] = {}
        self._noting = True
        self._wanted: dict[torch.nn.Module, int] = {}  # tensors of a layer still to come in this reload
        self._arrived: dict[str, Tensor] = {}

    def fits(self, model: torch.nn.Module, shards: Mapping[str, Any]) -> bool:
        """Whether the next reload, already begun, may follow it: the same tensors into the same parameters."""
        return (
            not self._noting
            and self._model is model
            and self._shards == shards
            and self._layers.keys() <= set(model.modules())
            and all(loads.made == _made(layer, loads) for layer, loads in self._layers.items())
        )

    def begin(self) -> None:
        self._arrived = {}
        self._wanted = {layer: len(loads.names) for layer, loads in self._layers.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Those that have come. A layer is loaded when it has all of its own."""
        if self._noting:
            self._load_noting(tensors)
            return
        if others := [(name, tensor) for name, tensor in tensors.items() if name not in self._of_name]:
            self._model.load_weights(iter(others))
        for name in [name for name in tensors if name in self._of_name]:
            self._arrived[name] = tensors[name]
            for layer in self._of_name[name]:
                self._wanted[layer] -= 1
                if not self._wanted[layer]:
                    self._load_layer(layer, self._layers[layer])

    def end(self) -> None:
        """Everything has come, vLLM's own end of the reload is next. RuntimeError where something has not."""
        if missing := [layer for layer, count in self._wanted.items() if count]:
            names = {name for layer in missing for name in self._layers[layer].names} - self._arrived.keys()
            raise RuntimeError(f"weight sync: {len(names)} tensors did not come, first {min(names)}")
        if not self._noting:
            return
        for layer, loads in self._layers.items():
            for name in loads.names:
                self._of_name.setdefault(name, []).append(layer)
        others = {"", *(self._shards.keys() - self._of_name.keys())}
        while spoiled := [layer for layer, loads in self._layers.items() if others & loads.names.keys()]:
            others.update(*(self._layers.pop(layer).names for layer in spoiled))
        self._of_name = {name: layers for name, layers in self._of_name.items() if name not in others}
        self._noting = False

    def _load_noting(self, tensors: dict[str, Tensor]) -> None:
        given: dict[Any, str] = {}
        for name, tensor in tensors.items():
            given[_place(tensor)] = "" if _place(tensor) in given else name
        original = layerwise._layerwise_process

        def processed(layer: torch.nn.Module, info: Any) -> None:
            self._note(layer, info, given)
            self._layers[layer].at_once = True
            original(layer, info)

        layerwise._layerwise_process = processed
        try:
            self._model.load_weights(iter(tensors.items()))
        finally:
            layerwise._layerwise_process = original
        for layer in self._model.modules():  # while the tensors are there to be known again
            info = layerwise.get_layerwise_info(layer)
            if info.can_load() and info.loaded_weights:
                self._note(layer, info, given)

    def _note(self, layer: torch.nn.Module, info: Any, given: dict[Any, str]) -> None:
        """The calls that are new since the last time."""
        loads = self._layers.setdefault(layer, _LayerLoads())
        for parameter, bound in info.loaded_weights[len(loads.calls) :]:
            weights = {k: v for k, v in bound.arguments.items() if isinstance(v, Tensor) and k != "param"}
            kept = OrderedDict((k, None if k == "param" or k in weights else v) for k, v in bound.arguments.items())
            name = given.get(_place(next(iter(weights.values()))), "") if len(weights) == 1 else ""
            loads.calls.append(_Call(parameter, bound.signature, kept, next(iter(weights), ""), name))
        loads.numel = info.load_numel
        loads.made = _made(layer, loads)

    def _load_layer(self, layer: torch.nn.Module, loads: _LayerLoads) -> None:
        info = layerwise.get_layerwise_info(layer)
        if info.loaded_weights:
            raise RuntimeError(f"weight sync: vLLM loaded {layer} beside the plan of its reload")
        for call in loads.calls:
            arguments = OrderedDict(call.kept)
            arguments[call.key] = self._arrived[call.name]
            info.loaded_weights.append((call.parameter, inspect.BoundArguments(call.signature, arguments)))
        info.load_numel = loads.numel
        if loads.at_once:
            layerwise._layerwise_process(layer, info)
        for name in loads.names:
            if not any(self._wanted[other] for other in self._of_name[name]):
                del self._arrived[name]  # its memory goes


def _made(layer: torch.nn.Module, loads: _LayerLoads) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The layer's parameters that the calls load, as they stand before any is loaded."""
    tensors = {call.parameter: getattr(layer, call.parameter, None) for call in loads.calls}
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items() if tensor is not None}


def _place(tensor: Tensor) -> Any:
    """The same for two tensors of the same memory in the same shape, whole or partial."""
    if isinstance(tensor, PartialTensor):
        return tensor.hf_name, tensor.rect, *_place(tensor.local), tuple(tensor.shape)
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return (id(tensor),)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """A digest of every weight this worker computes with, by vLLM's name: /weight_checker's, and those it cannot see.

    On a CPU a linear layer's weight lives in oneDNN's own memory alone:
    there the digest is of its product with a fixed input.
    """
    digests = compute_tensor_digests(model)
    for name, layer in model.named_modules():
        linear = getattr(layer, "cpu_linear", None)
        width = getattr(layer, "input_size_per_partition", None) or getattr(layer, "embedding_dim", None)
        if linear is None or width is None:
            continue
        probe = (
            torch.arange(PROBE_ROWS * width, dtype=torch.float32).sin().view(PROBE_ROWS, width).to(layer.weight.dtype)
        )
        out = linear(probe, layer.weight, None)
        digests[f"{name}.cpu_linear"] = hashlib.sha256(out.contiguous().view(torch.uint8).numpy()).hexdigest()
    return digests


def fingerprint_of_folder(vllm_config: VllmConfig, folder: str) -> dict[str, str]:
    """The digests of a second model that vLLM's loader makes from a Hugging Face folder
    in this process, freed at once.
    """
    config = copy.copy(vllm_config)
    config.load_config, config.model_config = _reading(vllm_config, folder)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    # where layers register by name: the names of the running model are taken
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    known: Any = dict(layerwise.LAYERWISE_INFO)
    with set_current_vllm_config(config):
        model = get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)
    if any(layerwise.LAYERWISE_INFO[layer] is not info for layer, info in known.items()):
        raise RuntimeError("vLLM forgot how it loaded the serving model while another was loaded beside it")
    return fingerprint(model)


def reload_folder(vllm_config: VllmConfig, model: torch.nn.Module, folder: str) -> None:
    """The serving model, in place, from a Hugging Face folder: one layer after the other, so that no second model is
    ever there. Where it fails half way, see abandon_reload.
    """
    load_config, model_config = _reading(vllm_config, folder)
    loader: Any = get_model_loader(load_config)
    layerwise.initialize_layerwise_reload(model)
    model.load_weights(loader.get_all_weights(model_config, model))  # type: ignore[operator]
    layerwise.finalize_layerwise_reload(model, model_config)


def _reading(vllm_config: VllmConfig, folder: str) -> tuple[Any, Any]:
    """How a folder's weights are read, whatever the running engine began on: it may have been dummies."""
    model_config = copy.copy(vllm_config.model_config)
    model_config.model, model_config.revision = folder, None
    return dataclasses.replace(vllm_config.load_config, load_format="auto"), model_config
