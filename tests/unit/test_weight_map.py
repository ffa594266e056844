"""The weight map: rectangles cover every tensor once in every layout, and loading then gathering is the identity."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megarl.errors import UserError
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap
from megarl.weights.reshard.gather import plan_gather

LAYOUTS = [
    Layout(),
    Layout(tp=2, pp=2, ep=2, world=4),
    Layout(pp=2, vpp=2, world=2),
    Layout(tp=2, etp=2, world=4),
    Layout(ep=8, world=8),
    Layout(tp=2, cp=2, ep=4, world=8),
    Layout(pp=2, first_stage_layers=1, world=4),
]


def random_weights(weight_map: WeightMap) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in weight_map.hf_shapes.items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dense", [[], [0]])
def test_cutting_and_putting_together_is_the_identity(
    hf_config: dict[str, Any], layout: Layout, dense: list[int]
) -> None:
    weight_map = WeightMap({**hf_config, "mlp_only_layers": dense, "vocab_size": 31})  # 31: padded under TP
    weights = random_weights(weight_map)
    held: list[dict[tuple[int, str], torch.Tensor]] = []
    for rank in range(layout.world):
        held.append({})
        for param in weight_map.params(layout, layout.coord(rank)):
            local = torch.zeros(param.shape)
            for piece in param.pieces:
                source = weights[piece.hf_name][piece.rect.slices]
                local[piece.local.slices] = source
            held[rank][param.chunk, param.name] = local
    for name, sends in plan_gather(weight_map, layout).items():
        full = torch.full(weight_map.hf_shapes[name], torch.nan)
        for send in sends:
            full[send.transfer.rect.slices] = send.transfer.cut(held[send.rank])
        assert torch.equal(full, weights[name]), name


def test_grouped_qkv_is_queries_key_value_of_each_group(hf_config: dict[str, Any]) -> None:
    weight_map = WeightMap({**hf_config, "head_dim": 16})  # 4 heads in 2 groups
    layout = Layout(tp=2, world=2)
    param = next(
        p
        for p in weight_map.params(layout, layout.coord(1))
        if p.name.endswith("layers.0.self_attention.linear_qkv.weight")
    )
    assert param.shape == (64, 64)
    rows = [
        (piece.hf_name.split(".")[-2], piece.rect.offset[0], piece.offset[0], piece.rect.size[0])
        for piece in param.pieces
    ]
    assert rows == [("q_proj", 32, 0, 32), ("k_proj", 16, 32, 16), ("v_proj", 16, 48, 16)]


def test_each_content_has_one_first_holder(hf_config: dict[str, Any]) -> None:
    weight_map, layout = WeightMap(hf_config), Layout(tp=2, cp=2, ep=2, world=8)
    holders: dict[tuple[Any, ...], int] = {}
    for rank in range(layout.world):
        for param in weight_map.params(layout, layout.coord(rank)):
            key = (param.name, tuple((piece.hf_name, piece.rect.offset) for piece in param.pieces))
            holders[key] = holders.get(key, 0) + (param.replica == 0)
    assert set(holders.values()) == {1}


def test_the_order_of_ranks_is_a_bijection() -> None:
    layout = Layout(tp=2, pp=2, cp=2, ep=4, world=16)
    coords = [layout.coord(rank) for rank in range(16)]
    assert len({(c.tp, c.cp, c.dp, c.pp) for c in coords}) == 16 == len({(c.etp, c.ep, c.edp, c.pp) for c in coords})
    for coord, rank in zip(coords, itertools.count()):
        assert layout.rank_of(tp=coord.tp, cp=coord.cp, dp=coord.dp, pp=coord.pp) == rank


def test_an_unknown_family_is_refused_by_name(hf_config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="'gpt2' has no weight map"):
        WeightMap({**hf_config, "model_type": "gpt2"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": "4"}, "num_hidden_layers '4', it must be a whole number"),
        ({"num_hidden_layers": None}, "num_hidden_layers None, it must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0, it must be more than 0"),
        ({"max_position_embeddings": "1024"}, "max_position_embeddings '1024', it must be a whole number"),
        ({"hidden_size": 64.5}, "hidden_size 64.5, it must be a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps '1e-6', it must be a number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_theta '1e4', it must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false', it must be true or false"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok 0, which is none of 1 to its 8 experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9, which is none of 1 to its 8 experts"),
        ({"model_type": ["llama"]}, "model_type \\['llama'\\] has no weight map"),
    ],
)
def test_a_value_of_config_json_that_no_model_has(hf_config: dict[str, Any], change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        WeightMap(hf_config | change)
