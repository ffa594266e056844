"""What a Hugging Face checkpoint may hold besides the tensors of its
map: block-FP8 scales, multi-token prediction, computed constants.

Everything here takes names and small functions, so that any reader of files can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.weights.map.relations import Piece
from megarl.weights.map.weight_map import WeightMap

SCALE = "_scale_inv"  # of tensor X is X + SCALE, float32, one value a block
COMPUTED = ".rotary_emb.inv_freq"  # older checkpoints store what config.json already says


def block_size(hf: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block of a block-FP8 checkpoint; None where config.json names no quantisation."""
    quantization = hf.get("quantization_config")
    if not quantization:
        return None
    rows, columns = quantization["weight_block_size"]
    return rows, columns


def dequantized(read: Callable[[Piece], Tensor], piece: Piece, block: tuple[int, int]) -> Tensor:
    """A rectangle of a block-FP8 matrix as bfloat16: value times its
    block's scale, in float32 (DeepSeek-V3, inference/kernel.py).

    read: reads a rectangle as it is stored. The rectangle need not be aligned to blocks.
    """
    rows, columns = (
        torch.arange(start, start + n) // size for start, n, size in zip(piece.hf_start, piece.shape, block)
    )
    first = (int(rows[0]), int(columns[0]))
    shape = (int(rows[-1]) - first[0] + 1, int(columns[-1]) - first[1] + 1)
    scale = read(Piece(piece.hf + SCALE, first, (0, 0), shape)).float()
    return (read(piece).float() * scale[rows - first[0]][:, columns - first[1]]).bfloat16()


def carried(names: Collection[str], weight_map: WeightMap) -> list[str]:
    """Tensors that are not trained but belong to every copy of the
    checkpoint: its multi-token prediction layers, sorted.

    names: all tensors of the checkpoint. UserError names a tensor that
    is missing, or that neither the map nor config.json knows.
    """
    hf, layers = weight_map.hf, weight_map.num_layers
    missing = next((name for name in weight_map.hf_shapes if name not in names), None)
    if missing:
        raise UserError(
            f"model.path: tensor {missing!r} is missing from the checkpoint; it does not match its config.json"
        )
    extra = int(hf.get("num_nextn_predict_layers", hf.get("num_mtp_layers", 0)) or 0)
    prediction = tuple(f"model.layers.{layer}." for layer in range(layers, layers + extra))
    scaled = block_size(hf) is not None
    found: list[str] = []
    unknown: list[str] = []
    for name in sorted(set(names) - weight_map.hf_shapes.keys()):
        if name.endswith(COMPUTED) or (scaled and name.endswith(SCALE) and name.removesuffix(SCALE) in names):
            continue
        (found if prediction and name.startswith(prediction) else unknown).append(name)
    if unknown:
        raise UserError(
            f"model.path: the checkpoint holds {len(unknown)} tensors that a {hf['model_type']} with its config.json "
            "has not, first "
            f"{', '.join(map(repr, unknown[:3]))}; use the config.json that belongs to it"
        )
    return found


def exported_config(hf: dict[str, Any]) -> dict[str, Any]:
    """config.json for a copy whose tensors are dequantised: the same, without the quantisation."""
    return {key: value for key, value in hf.items() if key != "quantization_config"}
