"""Which implementation of layers, attention, experts and Adam this process uses, decided in one place.

Transformer Engine where it is installed and there is a GPU, else megatron-core's local layers
with our attention and experts. Both have run on an H200 (docs/gpu.md).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch

from megarl.config import EngineConfig
from megarl.engine.device import Device

Adam = Literal["Transformer Engine", "Apex", "torch"]


@dataclass(frozen=True)
class Profile:
    transformer_engine: bool  # layer spec, norms, linear layers
    grouped_experts: bool
    fused_activation: (
        bool  # gated SiLU in one kernel forward and one backward: megatron-core's functions under torch.compile
    )
    adam: Adam

    @property
    def layers(self) -> str:
        if self.transformer_engine:
            return f"Transformer Engine {importlib.metadata.version('transformer-engine')}"
        return "megatron-core local layers"

    @property
    def attention(self) -> str:
        from megarl.engine.attention import varlen_attention

        if self.transformer_engine:
            return "Transformer Engine, packed (THD); megarl over torch under context parallelism"
        return "megarl.engine.attention over torch " + ("varlen_attn (GPU) or SDPA" if varlen_attention() else "SDPA")

    @property
    def experts(self) -> str:
        if not self.grouped_experts:
            return "sequential"
        if self.transformer_engine:
            return "Transformer Engine grouped GEMM"
        return "megarl.engine.experts over torch grouped_mm" + (", fused activation" if self.fused_activation else "")


def choose_profile(engine: EngineConfig, device: Device, *, latent: bool = False) -> Profile:
    """engine.transformer_impl and what is installed; latent attention has local layers only (engine/mla.py), and so has
    float32.

    `setup_device()` must have run: megatron-core says which Adam it took.
    """
    wanted = engine.transformer_impl
    on_gpu = device.device.type == "cuda"
    exact = device.dtype(engine.dtype) == torch.float32  # Transformer Engine's float32 products are TF32
    return Profile(
        transformer_engine=wanted == "transformer_engine"
        or (wanted == "auto" and on_gpu and not latent and not exact and has_transformer_engine()),
        grouped_experts=engine.experts == "grouped",
        fused_activation=on_gpu and importlib.util.find_spec("triton") is not None,
        adam=chosen_adam(),
    )


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def chosen_adam() -> Adam:
    """megatron-core tries Transformer Engine's FusedAdam, Apex's and torch's AdamW, in this order
    (optimizer/distrib_optimizer.py).
    """
    from megatron.core.optimizer import distrib_optimizer as core

    return "Transformer Engine" if core.USING_TE_OPTIMIZER else "Apex" if core.USING_APEX_OPTIMIZER else "torch"
