"""The norm of all gradients without a wait for each.

megarl's answer to megatron-core's own norm where neither Transformer Engine nor Apex is installed (utils.py,
local_multi_tensor_l2_norm): it reads the norm of every tensor on the host. The numbers are the same to the last bit
(tests/unit/test_grad_norm.py).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """In this process, for every optimizer step from here on; only where megatron-core would take its own."""
    clip, utils = (importlib.import_module(f"megatron.core.{name}") for name in ("optimizer.clip_grads", "utils"))
    if clip.__dict__.get("l2_norm_impl") is utils.__dict__["local_multi_tensor_l2_norm"]:
        clip.__dict__["l2_norm_impl"] = l2_norm


def l2_norm(chunk: int, overflow: Tensor, tensors: list[list[Tensor]], *each: Any) -> tuple[Tensor, None]:
    """Float32 [1], on the device of the tensors, of all elements of tensors[0]; under the name and with the arguments
    that megatron-core gives.
    """
    return torch.stack([torch.norm(tensor) for tensor in tensors[0]]).norm().float().view(1), None
