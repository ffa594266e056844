"""A worker that does not hold what it received is told of, down to one expert of a large model in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarl.weights.reshard.bit_sums import BitSums, HeldCheck, part_of

LAYERS, EXPERTS, HIDDEN, WIDTH = 24, 32, 16, 8
BF16 = torch.bfloat16


def received(seed: int) -> dict[str, Tensor]:
    """By Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (40, HIDDEN)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkv"}
        for expert in range(EXPERTS):
            shapes |= {
                f"{name}.mlp.experts.{expert}.{x}_proj.weight": (WIDTH, HIDDEN) for x in ("gate", "up")
            }  # fmt: skip
        shapes[f"{name}.mlp.gate.bias"] = (EXPERTS,)
    found = {name: torch.randn(shape, generator=generator).to(BF16) for name, shape in shapes.items()}
    return {name: one.float() if name.endswith("bias") else one for name, one in found.items()}


def held(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As an engine holds them: stacked, fused, transposed, padded, cast; the embedding out of sight."""
    found = {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        found[f"{name}.self_attn.qkv_proj.weight"] = torch.cat(
            [tensors[f"{name}.self_attn.{x}_proj.weight"] for x in "qkv"]
        )
        experts = [
            torch.cat([tensors[f"{name}.mlp.experts.{e}.{x}_proj.weight"] for x in ("gate", "up")])
            for e in range(EXPERTS)
        ]
        packed = torch.nn.functional.pad(torch.stack(experts).transpose(1, 2), (0, 4))
        found[f"{name}.mlp.experts.routed_experts.w13_weight"] = packed
        found[f"{name}.mlp.gate.bias"] = tensors[f"{name}.mlp.gate.bias"].to(BF16)
    return found


def sums(tensors: dict[str, Tensor]) -> dict[str, int]:
    found = BitSums(BF16)
    for pair in tensors.items():
        found.add([pair])
    return found.numbers()


@pytest.fixture
def check() -> HeldCheck:
    """After the first sync of a worker, which was well."""
    check = HeldCheck()
    assert check.wrong(sums(received(0)), sums(held(received(0)))) == []
    return check


def test_what_was_loaded_agrees_however_it_is_laid_out(check: HeldCheck) -> None:
    assert len(sums(held(received(1)))) == 2 * LAYERS
    for seed in (1, 2):
        assert check.wrong(sums(received(seed)), sums(held(received(seed)))) == []


def test_an_expert_of_zeros_is_seen(check: HeldCheck) -> None:
    found = held(received(1))
    found["model.layers.17.mlp.experts.routed_experts.w13_weight"][5] = 0
    assert check.wrong(sums(received(1)), sums(found)) == ["layer 17, experts"]


def test_an_expert_and_a_layer_that_kept_their_old_weights_are_seen(check: HeldCheck) -> None:
    found, old = held(received(1)), held(received(0))
    for name in ("model.layers.3.self_attn.qkv_proj.weight", "model.layers.9.mlp.experts.routed_experts.w13_weight"):
        found[name] = old[name]
    assert check.wrong(sums(received(1)), sums(found)) == ["layer 3, all but experts", "layer 9, experts"]


def test_what_never_agrees_is_not_held_to_it() -> None:
    """As the embedding here, and every weight that a kernel quantises."""
    check = HeldCheck()
    assert check.wrong({"a": 1, "b": 2}, {"b": 3}) == check.wrong({"a": 1, "b": 2}, {}) == []


def test_a_worker_that_comes_late_is_held_to_what_agreed_before(check: HeldCheck) -> None:
    """Its first sync, which zeroes an expert, must not be what tells that experts never agree."""
    late, found = HeldCheck(check.agreeing), held(received(1))
    found["model.layers.17.mlp.experts.routed_experts.w13_weight"][5] = 0
    assert late.wrong(sums(received(1)), sums(found)) == ["layer 17, experts"]


def test_parts_have_one_name_on_both_sides() -> None:
    for names in (
        ("model.layers.2.mlp.experts.0.up_proj.weight", "model.layers.2.mlp.experts.w13_weight"),
        ("model.layers.2.mlp.shared_experts.up_proj.weight", "model.layers.2.mlp.experts.shared_experts.up.weight"),
        ("lm_head.weight", "model.norm.weight"),
    ):
        assert len({part_of(name) for name in names}) == 1
    assert part_of("model.layers.2.mlp.experts.0.up_proj.weight") != part_of("model.layers.2.mlp.gate.weight")
