"""Fake quantisation against scalar arithmetic of its own: the values of
each format are enumerated and the nearest one is looked for.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megarl.weights.reshard.quantize import QMAX, fake_quantize, is_quantized, row_maximum

F32 = np.float32
# Finite values below the largest of [exponent, mantissa] bits with this bias: subnormals first, by code.
FLOATS = {"fp8_e4m3": (4, 3, 7, 448.0), "fp8_e5m2": (5, 2, 15, 57344.0)}


def positive_values(mode: str) -> list[float]:
    """The non-negative values of the format in the order of their codes: an even code has an even last mantissa bit."""
    if mode.startswith("int"):
        return [float(n) for n in range(int({"int8": 127, "int4": 7}[mode]) + 1)]
    exponent_bits, mantissa_bits, bias, largest = FLOATS[mode]
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        fraction = mantissa / 2**mantissa_bits
        value = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
        if value <= largest:
            values.append(value)
    return values


def nearest(value: float, values: list[float]) -> float:
    """The closest of `values` to |value|, the even code on a tie, with the sign of `value`."""
    distances = [abs(candidate - abs(value)) for candidate in values]
    best = min(range(len(values)), key=lambda code: (distances[code], code % 2))
    return math.copysign(values[best], value)


def scalar(row: list[float], mode: str) -> list[float]:
    largest = max(abs(x) for x in row)
    scale = F32(F32(largest) / F32(QMAX[mode]))
    scale = F32(1) if scale == 0 else scale
    return [float(F32(nearest(float(F32(x) / scale), positive_values(mode))) * scale) for x in row]


def hard_rows() -> Tensor:
    """Random rows of many magnitudes, a zero row, one outlier, ties of each format, the smallest numbers of float32."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 24, generator=generator) * 10.0 ** torch.linspace(-6, 6, 12)[:, None]
    rows[1] = 0.0
    rows[2, 5] = 1e4
    ties = torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -3.5, 6.5, 127.0, 448.0, 57344.0])
    rows[3, :7], rows[3, 7:] = ties[:7], 0.0
    rows[4, :7], rows[4, 7:] = torch.tensor([448.0, 17.0, 19.0, -21.0, 0.0009765625, 0.0029296875, 232.0]), 0.25
    rows[5, :6], rows[5, 6:] = torch.tensor([57344.0, 9.0, 11.0, -13.0, 53248.0, 7.62939453125e-06]), 1.0
    rows[6, :4], rows[6, 4:] = torch.tensor([127.0, 63.5, -64.5, 0.5]), 3.0
    rows[7] = torch.full((24,), 1e-44)
    rows[8, :3], rows[8, 3:] = torch.tensor([9e-43, 8e-43, -1e-45]), 2e-43
    return rows


@pytest.mark.parametrize("mode", list(QMAX))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_scalar_arithmetic(mode: Any, dtype: torch.dtype) -> None:
    weight = hard_rows().to(dtype)
    wanted = torch.tensor([scalar(row, mode) for row in weight.float().tolist()])
    found = fake_quantize(weight, mode)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


@pytest.mark.parametrize("mode", list(QMAX))
def test_a_row_holds_few_values_and_keeps_its_largest(mode: Any) -> None:
    weight = torch.randn(5, 1000, generator=torch.Generator().manual_seed(1))
    found = fake_quantize(weight, mode)
    assert all(len(row.abs().unique()) <= len(positive_values(mode)) for row in found)
    torch.testing.assert_close(row_maximum(found), row_maximum(weight), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        fake_quantize(found, mode), found, rtol=1e-6, atol=0
    )  # nothing more is lost the second time


@pytest.mark.parametrize("mode", list(QMAX))
def test_columns_apart_are_bitwise_the_columns_of_the_whole(mode: Any) -> None:
    weight = hard_rows()
    halves = weight.chunk(2, dim=-1)
    amax = torch.maximum(*(row_maximum(half) for half in halves))
    assert torch.equal(
        torch.cat([fake_quantize(half, mode, amax) for half in halves], dim=-1), fake_quantize(weight, mode)
    )
    assert not torch.equal(
        torch.cat([fake_quantize(half, mode) for half in halves], dim=-1), fake_quantize(weight, mode)
    )


def test_none_changes_nothing_and_nan_stays() -> None:
    weight = hard_rows()
    assert torch.equal(fake_quantize(weight, "none"), weight)
    weight[0, 0] = float("nan")
    assert fake_quantize(weight, "fp8_e4m3")[0].isnan().all()  # a broken row must not look like a sound one


@pytest.mark.parametrize(
    ("name", "shape", "plain", "also"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), True, True),
        ("model.layers.0.mlp.experts.3.gate_proj.weight", (8, 8), True, True),
        ("model.layers.0.mlp.shared_expert.down_proj.weight", (8, 8), True, True),
        ("model.layers.0.mlp.gate.weight", (8, 8), False, True),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 8), False, True),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 8), False, True),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (8,), False, False),
        ("model.embed_tokens.weight", (32, 8), False, True),
        ("lm_head.weight", (32, 8), False, True),
        ("model.layers.0.self_attn.q_norm.weight", (8,), False, False),
        ("model.layers.0.self_attn.q_proj.bias", (8,), False, False),
    ],
)
def test_what_is_quantised(name: str, shape: tuple[int, ...], plain: bool, also: bool) -> None:
    assert is_quantized(name, shape) == plain
    assert is_quantized(name, shape, ["router", "embeddings"]) == also
