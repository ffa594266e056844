"""Sums of two numbers below 20, and their reward: `data.reward: examples.pretrained.arithmetic.right_sum`.

python examples/pretrained/arithmetic.py --out sums.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path


def right_sum(response: str, answer: str) -> float:
    """1 if the last number of the response is the answer, and 0.1 where the response has any number."""
    numbers = re.findall(r"\d+", response)
    if not numbers:
        return 0.0
    return 1.0 if numbers[-1] == answer.strip() else 0.1


def sums(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows {"prompt", "answer"}."""
    rng = random.Random(seed)
    pairs = [(rng.randrange(20), rng.randrange(20)) for _ in range(count)]
    return [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in pairs]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in sums(args.rows, args.seed)), encoding="utf-8")
