"""A model's folder whose parts say different things: shapes against config.json, an index against a single file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.convert import commands
from megarl.errors import UserError
from megarl.folders import begin, finish
from megarl.weights.files.hf_folder import carry_files
from megarl.weights.files.hf_index import HfIndex
from megarl.weights.files.hf_reader import HfReader
from megarl.weights.files.megatron_folder import MegatronReader, open_weights
from megarl.weights.files.safetensors_header import read_header
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap, load_hf_config
from tests.unit.test_convert import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("folder") / "hf", "qwen3_moe", layers=2)


def with_config(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of `folder` whose config.json says otherwise; None takes a key out."""
    copy = shutil.copytree(folder, to)
    inside = copy / "hf" if (copy / "hf").is_dir() else copy
    tree = {**load_hf_config(copy), **changes}
    (inside / "config.json").write_text(
        json.dumps({key: value for key, value in tree.items() if key not in changes or value is not None})
    )
    return copy


LARGER = [  # family, what config.json says instead, tensor, both shapes, keys
    ("llama", {"intermediate_size": 32}, "mlp.gate_proj.weight", "(64, 32)", "(32, 32)", "intermediate_size 32"),
    ("llama", {"vocab_size": 20}, "model.embed_tokens.weight", "(37, 32)", "(20, 32)", "vocab_size 20"),
    ("llama", {"num_key_value_heads": 2}, "k_proj.weight", "(64, 32)", "(32, 32)", "num_key_value_heads 2, head_dim"),
    ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2}, "q_proj.weight", "(64, 32)", "(32, 32)", "heads 2"),
    ("llama", {"head_dim": 8}, "q_proj.weight", "(64, 32)", "(32, 32)", "num_attention_heads 4, head_dim 8"),
    ("qwen3_moe", {"head_dim": None}, "q_proj.weight", "(64, 32)", "(32, 32)", "head_dim is not given"),
    ("qwen3_moe", {"moe_intermediate_size": 8}, "gate_proj.weight", "(16, 32)", "(8, 32)", "moe_intermediate_size 8"),
    ("qwen3_moe", {"num_experts": 4}, "mlp.gate.weight", "(8, 32)", "(4, 32)", "num_experts 4"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 8}, "shared_expert.gate_proj.weight", "(32, 32)", "(8, 32)", ""),
    ("mixtral", {"intermediate_size": 16}, "experts.0.w1.weight", "(64, 32)", "(16, 32)", "intermediate_size 16"),
    ("glm4_moe", {"n_routed_experts": 4}, "mlp.gate.weight", "(8, 32)", "(4, 32)", "n_routed_experts 4"),
    ("deepseek_v3", {"kv_lora_rank": 16}, "kv_a_proj_with_mqa.weight", "(48, 32)", "(32, 32)", "kv_lora_rank 16"),
    ("deepseek_v3", {"q_lora_rank": 16}, "q_a_proj.weight", "(32, 32)", "(16, 32)", "q_lora_rank 16"),
    ("deepseek_v3", {"v_head_dim": 8}, "kv_b_proj.weight", "(128, 32)", "(96, 32)", "v_head_dim 8"),
]


@pytest.mark.parametrize(("family", "says", "tensor", "found", "wanted", "keys"), LARGER)
def test_fault_02_a_tensor_larger_than_config_json_says_is_refused_by_key(
    tmp_path: Path, family: str, says: dict[str, Any], tensor: str, found: str, wanted: str, keys: str
) -> None:
    copy = with_config(make_folder(tmp_path / "whole", family, layers=2), tmp_path / "copy", **says)
    with HfReader(copy) as reader, pytest.raises(UserError) as caught:
        reader.carried(WeightMap(load_hf_config(copy)))
    line = str(caught.value)
    for words in (str(copy), tensor, f"has shape {found}, config.json wants {wanted}", keys, "use the config.json"):
        assert words in line, line
    assert "\n" not in line


def test_fault_02_a_scale_of_another_block_is_refused(tmp_path: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    copy = with_config(make_folder(tmp_path / "whole", "deepseek_v3", layers=1), tmp_path / "copy", **quantised)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale_inv"] = torch.ones(4, 4)  # of (32, 64): 2 x 4
    save_file(tensors, copy / "model.safetensors")
    with HfReader(copy) as reader, pytest.raises(UserError, match=r"_scale_inv' has shape \(4, 4\), .* wants \(2, 4\)"):
        reader.carried(WeightMap(load_hf_config(copy)))


def test_fault_02_only_rows_of_zeros_pad_a_vocabulary(tmp_path: Path, folder: Path) -> None:
    """A run's checkpoint under tp 3 has 39 rows for a vocabulary of 37."""
    padded = with_config(folder, tmp_path / "padded", vocab_size=39)
    tensors = load_file(padded / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name].nan_to_num(), torch.zeros(2, 32, dtype=torch.bfloat16)])
        tensors[name][36:37] = 1
    save_file(tensors, padded / "model.safetensors", {"format": "pt"})
    assert commands.hf_to_megatron_main(["--hf", str(padded), "--out", str(tmp_path / "step_1")]) == 0
    good = with_config(tmp_path / "step_1", tmp_path / "good", vocab_size=37)
    with MegatronReader(good) as reader:
        assert reader.whole_bits("lm_head.weight").shape == (37, 32)
    for size in (36, 20):
        cut = with_config(tmp_path / "step_1", tmp_path / f"cut{size}", vocab_size=size)
        wants = rf"has shape \(39, 32\), config.json wants \({size}, 32\) \(vocab_size {size}\)"
        with pytest.raises(UserError, match=wants):
            MegatronReader(cut)
    narrow = with_config(tmp_path / "step_1", tmp_path / "narrow", moe_intermediate_size=8)
    with pytest.raises(UserError, match=r"experts.linear_fc1.weight' .*\(moe_intermediate_size 8\)"):
        MegatronReader(narrow)


def read(path: Path) -> dict[str, torch.Tensor]:
    weight_map = WeightMap(load_hf_config(path))
    with open_weights(path, weight_map) as reader:
        reader.carried(weight_map)
        params = weight_map.params(Layout(), Layout().coord(0))
        return {piece.hf_name: reader.read(piece).float() for param in params for piece in param.pieces}


def split(folder: Path, to: Path, scale: float = 1.0) -> Path:
    """`folder` in two files and an index, every number times `scale`."""
    to.mkdir()
    shutil.copyfile(folder / "config.json", to / "config.json")
    tensors = {name: tensor * scale for name, tensor in load_file(folder / "model.safetensors").items()}
    names = list(tensors)
    where = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(names)}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: tensors[name] for name in names if where[name] == file}, to / file)
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return to


def test_fault_09_model_safetensors_goes_before_an_index_as_in_transformers(tmp_path: Path, folder: Path) -> None:
    both = split(folder, tmp_path / "both", scale=0.5)
    before = read(both)
    assert HfIndex(both).left_aside is None
    shutil.copyfile(folder / "model.safetensors", both / "model.safetensors")
    want, found = read(folder), read(both)
    for name, tensor in want.items():
        assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num()), name
    assert any(not torch.equal(before[name].nan_to_num(), want[name].nan_to_num()) for name in want)
    assert "reads model.safetensors, as transformers does, and leaves model.safetensors.index.json aside" in str(
        HfIndex(both).left_aside
    )


def test_a_dtype_that_is_not_read_is_named(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    with pytest.raises(UserError, match="tensor 'a' is F8_E8M0, which megarl does not read"):
        read_header(tmp_path / "x.safetensors")


def test_fault_09_a_single_file_of_another_name_is_read(tmp_path: Path, folder: Path) -> None:
    one = shutil.copytree(folder, tmp_path / "one")
    (one / "model.safetensors").rename(one / "model-00001-of-00001.safetensors")
    assert read(one).keys() == read(folder).keys()
    shutil.copyfile(one / "model-00001-of-00001.safetensors", one / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="has 2 safetensors files but no model.safetensors.index.json"):
        HfReader(one)


def test_fault_09_what_a_conversion_carries(tmp_path: Path) -> None:
    (tmp_path / "from" / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "from" / "LICENSES").mkdir()
    (tmp_path / "to").mkdir()
    names = ["LICENSE", "chat_template.jinja", "generation_config.json", "additional_chat_templates/rag.jinja"]
    for name in names:
        (tmp_path / "from" / name).write_text(f'{{"{name}": 1}}')
    carry_files(tmp_path / "from", tmp_path / "to")
    for name in names:
        assert (tmp_path / "to" / name).read_text() == (tmp_path / "from" / name).read_text(), name


def test_fault_03_an_export_replaces_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin("sft.out", out).joinpath("part").touch()
    assert [file.name for file in begin("sft.out", out).iterdir()] == [".megarl"], "what was interrupted begins anew"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(UserError, match=r"came into being meanwhile; .* is whole in '.*/\.out\.partial'"):
        finish("sft.out", out)
    assert (out / "mine").exists() and (tmp_path / ".out.partial").exists()
    shutil.rmtree(out)
    finish("sft.out", out)
    assert out.is_dir() and not any(out.iterdir()) and not (tmp_path / ".out.partial").exists()
    with pytest.raises(UserError, match="already exists"):
        begin("sft.out", out)
