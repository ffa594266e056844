"""docs/your_own_data.md from rows to transformers, its commands as they stand: cold start on conversations, RL with the
page's reward on rows of GSM8K, a Hugging Face folder, and a response of transformers' own.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.unit.test_own_data_shapes import TEMPLATE, blocks
from tools.tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240  # of one command


def test_fault_24_from_rows_to_transformers(tmp_path: Path) -> None:
    make_model(tmp_path / "models" / "base")
    sums = [(n, m) for n in range(2, 8) for m in range(2, 8)]
    rows = [{"question": f"{n} * {m}?", "answer": f"{n} * {m} = {n * m}.\n#### {n * m}"} for n, m in sums]
    turns = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in rows
    ]
    write(tmp_path / "data" / "train.jsonl", rows[:24])
    write(tmp_path / "data" / "test.jsonl", rows[24:28])
    write(tmp_path / "data" / "sft.jsonl", turns)
    for block in [*blocks("python"), *blocks("yaml")]:
        name = block.split("\n")[0].removeprefix("# ")
        if name in ("gsm8k_reward.py", "gsm8k.yaml"):
            (tmp_path / name).write_text(block, "utf-8")

    [commands] = blocks("sh")
    said = [run(tmp_path, line) for line in commands.splitlines()]
    assert "36 rows, the prompt from 'messages', the response from the last turn of 'messages'" in said[0]
    assert (
        f"{Path('data/train.jsonl')}: 24 rows, the prompt from 'question', the answer from 'answer' after ####"
        in said[1]
    )
    metrics = [json.loads(line) for line in (tmp_path / "runs" / "gsm8k" / "metrics.jsonl").open(encoding="utf-8")]
    assert [row["step"] for row in metrics] == [1, 2] and "eval/mean_at_k" in metrics[-1]
    judged = [json.loads(line) for line in (tmp_path / "runs" / "gsm8k" / "eval.jsonl").open(encoding="utf-8")]
    assert "mean@4" in said[3] and len(judged) == 4 * 4 and all(row["reward"] in (0.0, 1.0) for row in judged)
    [last] = blocks("python", " final")
    assert run(tmp_path, [sys.executable, "-c", last])


def run(folder: Path, command: str | list[str]) -> str:
    """What one command of the page prints, which must end well."""
    words = shlex.split(command) if isinstance(command, str) else command
    if words[0] == "megarl":
        words = [sys.executable, "-m", "megarl.cli", *words[1:]]
    elif words[0] == "python":
        words = [sys.executable, str(ROOT / words[1]), *words[2:]]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_model(folder: Path) -> None:
    """A tiny model whose tokenizer knows every printable character, and a chat template."""
    make_tiny_model(folder, vocab_size=128)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocab = tokenizer["model"]["vocab"]
    new = iter(chr(code) for code in range(32, 127) if chr(code) not in vocab)
    tokenizer["model"]["vocab"] = {next(new, word) if word.startswith("<x") else word: i for word, i in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
