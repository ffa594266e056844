"""Where the weight receiver reaches into vLLM's reload life cycle and
model loader: private names (vllm_release.py). tests/engine holds each.

On CUDA none of this has been run yet.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests

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
