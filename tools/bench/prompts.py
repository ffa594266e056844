"""What the prompts of a run take in a trainer rank: resident bytes a prompt, and seconds to read them.

    python tools/bench/prompts.py [--rows 100000] [--words 150]

Rows are a conversation of a system's and a user's turn, an answer and a few more keys, as rewards ask for; words are
made up, and so is the tokenizer, a byte-level BPE of 8,192 tokens with a chat template. Each line is of a fresh
process: a rank that asks servers and scores, and one that does not.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import PreTrainedTokenizerFast  # noqa: E402

from megarl.data import load_prompts  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


class Taken(NamedTuple):
    """Bytes a prompt. own: 4 a token, and the UTF-8 of its text."""

    resident: float
    own: float
    seconds: float


def write_rows(out: Path, rows: int, words: int) -> None:
    draws = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    known = ["".join(draws.choices(letters, range(26, 0, -1), k=draws.randint(2, 9))) for _ in range(5000)]
    with (out / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in range(rows):
            text = " ".join(draws.choices(known, k=max(8, int(draws.gauss(words, words / 4)))))
            turns = [("system", "Please reason step by step."), ("user", text)]
            messages = [{"role": role, "content": content} for role, content in turns]
            more = {"data_source": "bench", "ability": "math", "extra_info": {"index": row, "split": "train"}}
            file.write(json.dumps({"messages": messages, "answer": str(draws.randrange(1000)), **more}) + "\n")


def write_tokenizer(out: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<eos>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    with (out / "rows.jsonl").open(encoding="utf-8") as file:
        made.train_from_iterator((line for line, _ in zip(file, range(2000), strict=False)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out)


def measure(folder: Path, keeps: bool) -> Taken:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)  # what it imports is no prompt's
    gc.collect()
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    prompts, _ = load_prompts(folder / "rows.jsonl", tokenizer, max_tokens=100_000, on_bad_line="error", keeps=keeps)
    seconds = time.perf_counter() - start
    gc.collect()
    taken = psutil.Process().memory_info().rss - before
    own = sum(4 * len(prompt.tokens) + len(prompt.text.encode()) for prompt in prompts) if keeps else 0
    return Taken(taken / len(prompts), own / len(prompts), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=150)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out)
        write_rows(folder, args.rows, args.words)
        write_tokenizer(folder)
        print(f"{args.rows} rows of {(folder / 'rows.jsonl').stat().st_size / args.rows:.0f} bytes")
        fresh = multiprocessing.get_context("spawn")
        for name, keeps in (("asks servers", True), ("asks none", False)):
            with ProcessPoolExecutor(1, fresh) as pool:
                taken = pool.submit(measure, folder, keeps).result()
            own = f", {taken.own:.0f} of them its tokens and text" if keeps else ""
            print(f"a rank that {name}: {taken.resident:.0f} bytes a prompt{own}; read in {taken.seconds:.1f} s")


if __name__ == "__main__":
    main()
