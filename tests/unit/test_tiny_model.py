"""The tiny checkpoint and the digit-sum task: seeded, loadable, one token a character."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megarl.data import load_demonstrations, load_prompts
from megarl.reward import RewardInput, get_reward
from tools.digit_sum import write_task
from tools.tiny_model import CHARACTERS, make_tiny_model, make_tokenizer


def test_checkpoint_is_seeded_and_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = torch.get_rng_state()
    folders = [make_tiny_model(tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4))]
    assert torch.equal(torch.get_rng_state(), before)
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]

    model = AutoModelForCausalLM.from_pretrained(folders[0])
    assert type(model).__name__ == "Qwen3MoeForCausalLM" and model.dtype == torch.float32
    assert 4e5 < sum(p.numel() for p in model.parameters()) < 6e5
    assert not model.config.tie_word_embeddings and model.config.norm_topk_prob
    assert (model.config.num_experts, model.config.num_experts_per_tok, model.config.vocab_size) == (8, 2, 32)
    assert all((p - 1).abs().max() > 0.05 for name, p in model.named_parameters() if "norm" in name)

    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    tokens = tokenizer.encode(CHARACTERS)
    assert len(tokens) == len(CHARACTERS) == len(set(tokens)) and tokenizer.decode(tokens) == CHARACTERS
    assert len(tokenizer) == 32 and tokenizer.eos_token_id == model.config.eos_token_id
    logits = model(torch.tensor([tokens])).logits
    assert logits.isfinite().all()


def test_routing_is_not_near_tied(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path))
    tokens = torch.randint(3, 20, (8, 12), generator=torch.Generator().manual_seed(0))
    scores = torch.cat(model(tokens, output_router_logits=True).router_logits).float()
    top = scores.softmax(-1).sort(descending=True).values
    assert (top[:, 1] - top[:, 2]).median() > 0.02


def test_vocabulary_may_be_padded_but_not_cut(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, vocab_size=64, layers=1, dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["num_hidden_layers"], config["dtype"]) == (64, 1, "bfloat16")
    assert len(make_tokenizer(64)) == 64
    with pytest.raises(ValueError, match="vocab_size 8 is below"):
        make_tokenizer(8)


def test_digit_sum_files(tmp_path: Path) -> None:
    first, second = (write_task(tmp_path / name, seed=5, digits=4, train=300, valid=40, demos=500) for name in "ab")
    for name in ("train.jsonl", "valid.jsonl", "demos.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    tokenizer = make_tokenizer()
    train, _ = load_prompts(first / "train.jsonl", tokenizer, max_tokens=5, on_bad_line="error")
    valid, _ = load_prompts(first / "valid.jsonl", tokenizer, max_tokens=5, on_bad_line="error")
    texts = [p.text for p in [*train, *valid]]
    assert (len(train), len(valid), len(set(texts))) == (300, 40, 340)
    assert all(int(p.answer) == sum(map(int, p.text[:-1])) % 10 and len(p.tokens) == 5 for p in [*train, *valid])

    rows = [json.loads(line) for line in (first / "demos.jsonl").read_text().splitlines()]
    assert len([*load_demonstrations(first / "demos.jsonl", tokenizer, 16, "error")]) == len(rows) == 500
    assert not {row["prompt"] for row in rows} & {p.text for p in valid}
    reward = get_reward("digit_sum")
    share = (
        sum(
            reward(RewardInput(row["response"], str(sum(map(int, row["prompt"][:-1])) % 10), row["prompt"]))
            for row in rows
        )
        / 500
    )
    assert 0.3 < share < 0.6  # four steps with a slip in five each, and the few wrong paths that end right
    assert {len(row["response"]) for row in rows} == {1, 2, 3, 4}
