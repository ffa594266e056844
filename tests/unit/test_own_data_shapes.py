"""docs/your_own_data.md, as it stands: its rows are read, its reward is called, its settings are keys that exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.config import load_config
from megarl.data import load_demonstrations, load_prompts
from megarl.data.shapes import ANSWER_KEYS, PROMPT_KEYS, RESPONSE_KEYS
from megarl.reward.inputs import OFFERED, VERL
from tools.tiny_model import make_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your_own_data.md"
BLOCK = re.compile(r"^```(\w+)( \w+)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TEMPLATE = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}assistant:"


def blocks(kind: str, mark: str = "") -> list[str]:
    return [text for found, marked, text in BLOCK.findall(PAGE.read_text("utf-8")) if (found, marked) == (kind, mark)]


@pytest.fixture
def tokenizer() -> Any:
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def test_the_rows_are_read(tmp_path: Path, tokenizer: Any) -> None:
    prompts, demonstrations = blocks("json")
    path, settings = tmp_path / "rows.jsonl", dict(max_tokens=200, on_bad_line="error")
    path.write_text(prompts, "utf-8")
    found, _ = load_prompts(path, tokenizer, **settings)
    assert [prompt.answer for prompt in found] == ["24"] * prompts.count("\n") and len(found) == 8
    path.write_text(demonstrations, "utf-8")
    ended = [*load_demonstrations(path, tokenizer, 200, "error")]
    assert len(ended) == demonstrations.count("\n") == 5
    for tokens, length in ended:
        assert tokenizer.decode(tokens[length:]).endswith("24<eos>")
    [rows] = blocks("json", " columns")
    path.write_text(rows, "utf-8")
    columns = load_config(None, [f"data.columns={yaml.safe_load(blocks('yaml')[0])['data']['columns']}"]).data.columns
    [prompt], _ = load_prompts(path, tokenizer, columns=columns, **settings)
    assert (prompt.answer, prompt.text) == ("24", "user:4 x 6?\nassistant:")


def test_the_reward_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        for block in blocks("python"):
            if name := re.match(r"# (\w+\.py)\n", block):
                (tmp_path / name[1]).write_text(block, "utf-8")
            else:
                exec(compile(block, str(PAGE), "exec"), {"__name__": "page"})
    finally:
        assert sys.modules.pop("gsm8k_reward")


def test_the_settings_are_keys(tmp_path: Path) -> None:
    for block in blocks("yaml"):
        (tmp_path / "run.yaml").write_text(block, "utf-8")
        load_config(tmp_path / "run.yaml")


def test_the_page_names_every_key_and_every_parameter() -> None:
    text = PAGE.read_text("utf-8")
    for name in (*PROMPT_KEYS, *ANSWER_KEYS, *RESPONSE_KEYS, *OFFERED, *VERL):
        assert f"`{name}`" in text or f"`{name}`," in text, name
