"""Checkpoints that hold more than the map's tensors: block FP8,
multi-token prediction, constants, and tensors nobody knows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.config import load_config
from megarl.convert.commands import hf_to_megatron_main, megatron_to_hf_main
from megarl.engine.build import build_engine
from megarl.engine.export import export_hf
from megarl.engine.parallel import destroy_parallel
from megarl.errors import UserError
from megarl.weights.files.hf_reader import HfReader
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap, load_hf_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.tiny_model import make_tiny_model  # noqa: E402

BLOCK = (24, 40)  # divides nothing here: the last blocks are cut, and no rectangle of a rank is aligned


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint as DeepSeek releases them: FP8 in blocks, one layer
    of multi-token prediction; and its tensors dequantised.
    """
    path = make_tiny_model(tmp_path_factory.mktemp("released") / "model", "deepseek_v3", layers=2, dtype="bfloat16")
    tensors = load_file(path / "model.safetensors")
    for name in [
        name for name in tensors if name.startswith("model.layers.1.")
    ]:  # layer 2: as layer 1, and a projection of its own
        tensors[name.replace("layers.1.", "layers.2.")] = tensors[name] + 0.5
    tensors["model.layers.2.eh_proj.weight"] = torch.randn(64, 128).bfloat16()
    want, stored = {}, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    for name, tensor in tensors.items():
        want[name] = stored[name] = tensor
        if name.endswith("proj.weight") or "proj_with_mqa" in name:
            stored[name], stored[name + "_scale_inv"] = _quantized(tensor)
            scale = torch.kron(stored[name + "_scale_inv"], torch.ones(BLOCK))[: tensor.shape[0], : tensor.shape[1]]
            want[name] = (stored[name].float() * scale).bfloat16()
            assert 0 < (want[name].float() - tensor.float()).abs().max() < 0.3
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    config = load_hf_config(path)
    config |= {
        "num_nextn_predict_layers": 1,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCK)},
    }
    (path / "config.json").write_text(json.dumps(config))
    return path, want


def _quantized(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = tensor.shape
    blocks = (-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    padded = torch.zeros(blocks[0] * BLOCK[0], blocks[1] * BLOCK[1])
    padded[:rows, :columns] = tensor.float()
    scale = padded.view(blocks[0], BLOCK[0], blocks[1], BLOCK[1]).abs().amax((1, 3)) / 448
    return (padded / torch.kron(scale, torch.ones(BLOCK)))[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=4, ep=2, world=4), Layout(tp=2, etp=2, world=2)], ids=str)
def test_rectangles_of_block_fp8_are_dequantised(
    released: tuple[Path, dict[str, torch.Tensor]], layout: Layout
) -> None:
    path, want = released
    weight_map = WeightMap(load_hf_config(path))
    with HfReader(path) as reader:
        for rank in range(layout.world):
            for param in weight_map.params(layout, layout.coord(rank)):
                for piece in param.pieces:
                    expected = want[piece.hf_name][piece.rect.slices]
                    got = reader.read(piece)
                    assert got.dtype == (torch.float32 if param.buffer else torch.bfloat16) and torch.equal(
                        got, expected
                    ), piece


def test_an_export_is_dequantised_and_carries_multi_token_prediction(
    released: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path, want = released
    engine = build_engine(load_config(None, [f"model.path={path}", "engine.dtype=bfloat16"]))
    export_hf(engine.model, str(path), tmp_path / "out")
    destroy_parallel()
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
    config = load_hf_config(tmp_path / "out")
    assert "quantization_config" not in config and config["num_nextn_predict_layers"] == 1
    assert any(".layers.2." in name for name in want) and any(name.endswith("e_score_correction_bias") for name in want)


def test_a_conversion_there_and_back_does_the_same(
    released: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path, want = released
    assert (
        hf_to_megatron_main(
            ["--hf", str(path), "--out", str(tmp_path / "megatron"), "--tp", "2", "--ep", "2", "--verify"]
        )
        == 0
    )
    assert (
        megatron_to_hf_main(["--megatron", str(tmp_path / "megatron"), "--out", str(tmp_path / "back"), "--verify"])
        == 0
    )
    got = load_file(tmp_path / "back" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
    for folder in (tmp_path / "megatron" / "hf", tmp_path / "back"):
        config = load_hf_config(folder)
        assert "quantization_config" not in config and config["num_nextn_predict_layers"] == 1


def test_tensors_that_are_missing_or_unknown_are_named(released: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = released
    config = load_hf_config(path)
    with HfReader(path) as reader:
        found = reader.carried(WeightMap(config))
        assert found and all(name.startswith("model.layers.2.") and not name.endswith("_scale_inv") for name in found)
        with pytest.raises(
            UserError, match=r"holds \d+ tensors that a deepseek_v3 .* first 'model.layers.2.eh_proj.weight'"
        ):
            reader.carried(WeightMap({**config, "num_nextn_predict_layers": 0}))
        with pytest.raises(UserError, match=r"tensor 'model.layers.3.input_layernorm.weight' is missing"):
            reader.carried(WeightMap({**config, "num_hidden_layers": 4}))
