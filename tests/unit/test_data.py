"""Prompts and demonstrations from JSONL: what is read, and what a user reads about a bad line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megarl.data import PromptStream, load_demonstrations, load_prompts
from megarl.errors import UserError
from tools.tiny_model import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.content == '13' %}{{ raise_exception('unlucky') }}{% endif %}{{ m.role[0] + ':' "
    "+ m.content + '\n' }}"
)
TEMPLATE += "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat():
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def write(folder: Path, *lines: str | bytes | dict) -> Path:
    path = folder / "rows.jsonl"
    raw = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in raw))
    return path


def test_plain_prompts(tmp_path: Path, tokenizer) -> None:
    path = write(
        tmp_path, {"prompt": "12=", "answer": "3"}, "", {"prompt": "405=", "answer": 9, "source": "extra keys are fine"}
    )
    prompts, bad = load_prompts(path, tokenizer, max_tokens=4, on_bad_line="error")
    assert bad == 0
    assert [(p.text, p.answer, p.line) for p in prompts] == [("12=", "3", 1), ("405=", "9", 3)]
    assert [tokenizer.decode(p.tokens) for p in prompts] == ["12=", "405="]
    assert [len(p.tokens) for p in prompts] == [3, 4]


def test_chat_template(tmp_path: Path, chat) -> None:
    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]
    path = write(tmp_path, {"messages": messages, "answer": "3"}, {"prompt": "4", "answer": "5"})
    prompts, _ = load_prompts(path, chat, max_tokens=64, on_bad_line="error")
    assert [p.text for p in prompts] == ["s:1\nu:2\na:", "u:4\na:"]
    assert len(prompts[0].tokens) == len(prompts[0].text)


BAD = [
    ('{"prompt": "1=", "answer"', "not JSON (Expecting ':' delimiter at column 26)"),
    ("[1]", "holds a list"),
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
    ('{"answer": "1"}', "key 'prompt' is None"),
    ('{"prompt": "", "answer": "1"}', "key 'prompt' is ''"),
    ('{"prompt": "1="}', "key 'answer' is None"),
    ('{"prompt": "1=", "answer": true}', "key 'answer' is True"),
    ('{"prompt": "123456789=", "answer": "5"}', "10 tokens are more than 9"),
    ('{"messages": [{"role": "user", "content": "1"}], "answer": "1"}', "no chat template"),
    ('{"messages": [], "answer": "1"}', "key 'messages' is []"),
    ('{"messages": [{"role": "usr", "content": "1"}], "answer": "1"}', "is not {'role'"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer, line: str | bytes, message: str) -> None:
    path = write(tmp_path, {"prompt": "1=", "answer": "1"}, "", line)
    with pytest.raises(UserError) as caught:
        load_prompts(path, tokenizer, max_tokens=9, on_bad_line="error")
    text = str(caught.value)
    assert (
        text.startswith(f"{path} line 3: ") and message in text and "data.on_bad_line=skip" in text and "\n" not in text
    )


def test_bad_lines_are_skipped_and_counted(tmp_path: Path, tokenizer) -> None:
    good = {"prompt": "1=", "answer": "1"}
    path = write(tmp_path, *(line for line, _ in BAD), good)
    prompts, bad = load_prompts(path, tokenizer, max_tokens=9, on_bad_line="skip")
    assert (len(prompts), bad, prompts[0].line) == (1, len(BAD), len(BAD) + 1)


def test_a_template_that_refuses_a_row_is_a_bad_line(tmp_path: Path, chat) -> None:
    path = write(tmp_path, {"prompt": "13", "answer": "1"})
    with pytest.raises(UserError, match="line 1: the tokenizer's chat template refuses it .*unlucky"):
        load_prompts(path, chat, max_tokens=9, on_bad_line="error")


def test_missing_and_empty_files(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(UserError, match=r"none.jsonl' does not exist; give a JSONL file"):
        load_prompts(tmp_path / "none.jsonl", tokenizer, max_tokens=9, on_bad_line="skip")
    with pytest.raises(UserError, match=r"no usable row \(0 bad lines\)"):
        load_prompts(write(tmp_path, "", " "), tokenizer, max_tokens=9, on_bad_line="error")
    with pytest.raises(UserError, match=r"no usable row \(2 bad lines\)"):
        load_demonstrations(write(tmp_path, "x", "y"), tokenizer, 9, "skip")


def test_demonstrations(tmp_path: Path, tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    path = write(
        tmp_path, {"prompt": "12=", "response": "13"}, {"prompt": "12="}, {"prompt": "12=", "response": "12345"}
    )
    with pytest.raises(UserError, match="line 2: key 'response' is None"):
        load_demonstrations(path, tokenizer, 8, "error")
    [(tokens, prompt_len)] = load_demonstrations(path, tokenizer, 8, "skip")
    assert prompt_len == 3 and tokenizer.decode(tokens) == "12=13<eos>" and tokens[-1] == tokenizer.eos_token_id
    assert "skipped 2 bad lines" in caplog.text


def test_stream_sees_each_prompt_once_an_epoch() -> None:
    stream = PromptStream(7, seed=3)
    epochs = [sorted(stream.next(7)) for _ in range(3)]
    assert epochs == [list(range(7))] * 3
    assert PromptStream(7, seed=3).next(21) != PromptStream(7, seed=4).next(21)
    assert PromptStream(3, shuffle=False).next(7) == [0, 1, 2, 0, 1, 2, 0]


def test_stream_resumes_exactly() -> None:
    rng = random.Random(0)
    for _ in range(50):
        n, before, after = rng.randint(1, 9), rng.randint(0, 30), rng.randint(1, 30)
        whole = PromptStream(n, seed=1)
        whole.next(before)
        resumed = PromptStream(n, seed=1)
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        assert resumed.next(after) == whole.next(after)


def test_stream_refuses_the_state_of_another_run() -> None:
    for other, name in (
        (PromptStream(6, 0), "number of prompts"),
        (PromptStream(5, 1), "run.seed"),
        (PromptStream(5, 0, False), "data.shuffle"),
    ):
        with pytest.raises(UserError, match=name):
            PromptStream(5, 0).load_state_dict(other.state_dict())
