"""Fake quantisation of what the rollout receives: how a machine without
low-precision kernels studies low-precision rollouts.

Weight-only, symmetric, one scale for each row of a Hugging Face [out, in] matrix (each expert alone): scale = max|w| /
qmax, or 1 where that is zero; w / scale is rounded to the nearest value of the format, ties to even; float32
arithmetic. Norms and biases are never quantised; the router and the embeddings (lm_head counts as one: both are indexed
by the vocabulary) only where they are asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.weights.map.relations import Piece
from megarl.weights.map.weight_map import Param

Mode = Literal["none", "fp8_e4m3", "fp8_e5m2", "int8", "int4"]
Also = Literal["router", "embeddings"]

QMAX: dict[str, float] = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "int8": 127.0, "int4": 7.0}
FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def row_maximum(weight: Tensor) -> Tensor:
    """max|w| of each row, float32 [..., out, 1]. Where `in` is split over ranks, the maximum over them is the row's."""
    return weight.abs().amax(-1, keepdim=True).float()


def fake_quantize(weight: Tensor, mode: Mode, amax: Tensor | None = None) -> Tensor:
    """`weight` [..., out, in] as the format would give it back, float32.

    amax: row_maximum of the whole rows, where `weight` holds only some of their columns.
    """
    if mode == "none":
        return weight.float()
    limit = QMAX[mode]
    scale = (row_maximum(weight) if amax is None else amax) / limit
    scale = scale.masked_fill(scale == 0, 1.0)
    # The clamp acts only where the scale is subnormal and was itself rounded: e5m2 would overflow to infinity there.
    scaled = (weight.float() / scale).clamp_(-limit, limit)
    rounded = scaled.to(FLOAT8[mode]).float() if mode in FLOAT8 else scaled.round()
    return rounded * scale


def is_quantized(name: str, shape: tuple[int, ...], also: Collection[Also] = ()) -> bool:
    """Whether the tensor of this Hugging Face name and full shape is quantised at all."""
    if len(shape) < 2:
        return False
    if name.endswith(
        "gate.weight"
    ):  # mlp.gate, block_sparse_moe.gate, shared_expert_gate; gate_proj is an ordinary matrix
        return "router" in also
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return "embeddings" in also
    return True


@contextmanager
def quantized_weights(
    params: Iterable[tuple[Param, Tensor]],
    hf_shapes: dict[str, tuple[int, ...]],
    mode: Mode,
    also: Collection[Also],
    tp_group: dist.ProcessGroup,
    etp_group: dist.ProcessGroup,
) -> Iterator[None]:
    """Inside, the parameters of this rank hold their quantised values;
    afterwards, bitwise what they held before. Collective.

    Costs a copy of what is quantised. The values pass through the
    parameters' dtype before they are cast to that of the rollout.
    """
    quantized = [
        _Quantized(param, piece, tensor.detach()[piece.local.slices])
        for param, tensor in (params if mode != "none" else [])
        for piece in param.pieces
        if is_quantized(piece.hf_name, hf_shapes[piece.hf_name], also)
    ]
    maxima = [row_maximum(each.values) for each in quantized]
    for group, expert in ((tp_group, False), (etp_group, True)):
        split = [
            i
            for i, (param, piece, _) in enumerate(quantized)
            if param.expert == expert and piece.rect.size[-1] < hf_shapes[piece.hf_name][-1]
        ]
        if split:
            joined = torch.cat([maxima[i].flatten() for i in split])
            dist.all_reduce(joined, op=dist.ReduceOp.MAX, group=group)
            for i, whole in zip(split, joined.split([maxima[i].numel() for i in split]), strict=True):
                maxima[i] = whole.view_as(maxima[i])
    originals = [each.values.clone() for each in quantized]
    try:
        for each, amax in zip(quantized, maxima, strict=True):
            each.values.copy_(fake_quantize(each.values, mode, amax))
        yield
    finally:
        for each, original in zip(quantized, originals, strict=True):
            each.values.copy_(original)


class _Quantized(NamedTuple):
    param: Param
    piece: Piece
    values: Tensor  # the piece in the parameter: a view
