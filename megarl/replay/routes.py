"""Routes as arrays: routes[row, moe_layer, k] holds the experts that row's input token went to (spec/routing.md, "Contract")."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def route_dtype(num_experts: int) -> np.dtype:
    """The smallest unsigned type that holds every expert's number; on the wire routes travel as its bytes."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


def only_moe_layers(routes: np.ndarray, moe_layers: list[int], num_layers: int) -> np.ndarray:
    """[T, L, K] of all transformer layers or of the MoE layers only -> MoE layers only. Any other count is an error."""
    if routes.shape[1] == len(moe_layers):
        return routes
    if routes.shape[1] == num_layers:
        return routes[:, moe_layers]
    raise ValueError(f"routes of {routes.shape[1]} layers; the model has {len(moe_layers)} MoE layers of {num_layers} layers")


def check_routes(routes: np.ndarray, rows: int, layers: int, num_experts: int, top_k: int) -> str | None:
    """What is wrong with one response's routes, or None. Wrong routes would hang the all-to-all or train other experts."""
    if routes.shape != (rows, layers, top_k):
        return f"shape {routes.shape}, not (tokens - 1, MoE layers, top-k) = {(rows, layers, top_k)}"
    if routes.dtype.kind not in "ui":
        return f"dtype {routes.dtype}, not an integer"
    if rows and (routes.min() < 0 or routes.max() >= num_experts):
        return f"expert {int(routes.max())} outside 0..{num_experts - 1}"
    ordered = np.sort(routes, axis=-1)
    same = (ordered[..., 1:] == ordered[..., :-1]).any(axis=(1, 2))
    if same.any():
        return f"row {int(same.argmax())} names an expert twice"
    return None


def spread_routes(rows: int, layers: int, num_experts: int, top_k: int, start: int = 0) -> Tensor:
    """Distinct experts for padding rows, spread evenly over the load; int64 [rows, layers, K]."""
    first = (torch.arange(start, start + rows) * top_k)[:, None, None]
    return ((first + torch.arange(top_k)) % num_experts).expand(rows, layers, top_k).clone()


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """|set(a) & set(b)| / k for [rows, L, K] against [rows, L, K]; float32 [rows, L]. Order within a row carries no meaning."""
    return (a[..., :, None] == b[..., None, :]).any(-1).float().mean(-1)
