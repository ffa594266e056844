"""Sums of two numbers below 20, those to train on and those held out, and their reward:
`data.reward: examples.pretrained.arithmetic.right_sum`.

python examples/pretrained/arithmetic.py --out DIR      # DIR/sums.jsonl, DIR/held_out.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

LIMIT = 20
HELD_OUT = 64  # of the 400


def right_sum(response: str, answer: str) -> float:
    """1 if the last number of the response is the answer, else 0."""
    numbers = re.findall(r"\d+", response)
    return float(bool(numbers) and numbers[-1] == answer.strip())


def sums(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows {"messages", "answer"}: to train on, and held out, with no pair of numbers in both."""
    pairs = list(itertools.product(range(LIMIT), repeat=2))
    random.Random(seed).shuffle(pairs)
    rows = [{"messages": _messages(a, b), "answer": str(a + b)} for a, b in pairs]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def _messages(a: int, b: int) -> list[dict[str, str]]:
    turns = [("system", "Answer with a number."), ("user", f"What is {a} + {b}?")]
    return [{"role": role, "content": content} for role, content in turns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("sums.jsonl", "held_out.jsonl"), sums(args.seed), strict=True):
        (args.out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{args.out / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
