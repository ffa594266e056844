"""What a copy of a block-FP8 checkpoint holds: its tensors dequantised, its config.json without the quantisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megarl.weights.files.hf_index import SCALE
from megarl.weights.map.relations import HfSlice
from megarl.weights.rect import Rect

if TYPE_CHECKING:
    from torch import Tensor


DEQUANTIZED = "bfloat16"


def dequantized(read: Callable[[HfSlice], Tensor], piece: HfSlice, block: tuple[int, int]) -> Tensor:
    """A rectangle of a block-FP8 matrix as bfloat16: value times its
    block's scale, in float32 (DeepSeek-V3, inference/kernel.py).

    read: reads a rectangle as it is stored. The rectangle need not be aligned to blocks.
    """
    import torch  # no other tensor of a folder is computed with

    rows, columns = (
        torch.arange(start, start + n) // size
        for start, n, size in zip(piece.rect.offset, piece.rect.size, block, strict=True)
    )
    first = (int(rows[0]), int(columns[0]))
    shape = (int(rows[-1]) - first[0] + 1, int(columns[-1]) - first[1] + 1)
    scale = read(HfSlice(piece.hf_name + SCALE, Rect(first, shape))).float()
    return (read(piece).float() * scale[rows - first[0]][:, columns - first[1]]).bfloat16()


def exported_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    """config.json for a copy whose tensors are dequantised: the same, without the quantisation."""
    return {key: value for key, value in hf_config.items() if key != "quantization_config"}
