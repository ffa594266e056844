"""Routes as arrays: routes[row, moe_layer, k] holds the experts that
row's input token went to (docs/routing.md, "Contract").
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def route_dtype(num_experts: int) -> np.dtype:
    """The smallest unsigned type that holds every expert's number; on the wire routes travel as its bytes."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


def only_moe_layers(routes: np.ndarray, moe_layers: list[int], num_layers: int) -> np.ndarray:
    """[T, L, K] of all transformer layers or of the MoE layers only -> MoE layers only.
    ValueError for any other count.
    """
    if routes.ndim != 3 or routes.shape[1] not in (len(moe_layers), num_layers):
        raise ValueError(
            f"shape {routes.shape}, not (tokens - 1, {len(moe_layers)} MoE layers of {num_layers} layers, top-k)"
        )
    return routes if routes.shape[1] == len(moe_layers) else routes[:, moe_layers]


def check_routes(routes: np.ndarray, rows: int, layers: int, num_experts: int, top_k: int) -> None:
    """ValueError, what is wrong and what was expected. Wrong routes would hang the
    all-to-all or train other experts.
    """
    if routes.shape != (rows, layers, top_k):
        raise ValueError(f"shape {routes.shape}, not (tokens - 1, MoE layers, top-k) = {(rows, layers, top_k)}")
    if routes.dtype.kind not in "ui":
        raise ValueError(f"dtype {routes.dtype}, not an integer")
    expected = f"not {top_k} distinct experts of 0..{num_experts - 1}"
    if rows and (int(routes.max()) >= num_experts or int(routes.min()) < 0):
        outside = (routes < 0) | (routes >= num_experts)
        row = int(outside.any(axis=(1, 2)).argmax())
        raise ValueError(f"row {row} names expert {int(routes[outside][0])}, {expected}")
    if top_k > 1 and rows and not routes.any():
        raise ValueError(f"all zero, {expected} a row: nothing was captured")
    # K columns compared pair by pair: a sort of so many rows of so few takes twenty times as long
    columns = np.ascontiguousarray(routes.reshape(-1, top_k).T)
    same = np.zeros(rows * layers, bool)
    for k in range(1, top_k):
        same |= (columns[:k] == columns[k]).any(axis=0)
    if same.any():
        row, layer = divmod(int(same.argmax()), layers)
        raise ValueError(
            f"row {row} names an expert twice, {routes[row, layer].tolist()} in MoE layer {layer}, {expected}"
        )


def accept_routes(
    routes: np.ndarray, rows: int, moe_layers: list[int], num_layers: int, num_experts: int, top_k: int
) -> np.ndarray:
    """One response's routes, as a rollout engine or a file gave them ->
    [rows, MoE layers, K]. ValueError says what is wrong.
    """
    routes = only_moe_layers(routes, moe_layers, num_layers)
    check_routes(routes, rows, len(moe_layers), num_experts, top_k)
    return routes


def spread_routes(rows: int, layers: int, num_experts: int, top_k: int, start: int = 0) -> Tensor:
    """Distinct experts for padding rows, spread evenly over the load; int64 [rows, layers, K]."""
    first = (torch.arange(start, start + rows) * top_k)[:, None, None]
    return ((first + torch.arange(top_k)) % num_experts).expand(rows, layers, top_k).clone()


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """|set(a) & set(b)| / k for [rows, L, K] against [rows, L, K];
    float32 [rows, L]. Order within a row carries no meaning.
    """
    return (a[..., :, None] == b[..., None, :]).any(-1).float().mean(-1)
