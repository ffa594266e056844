"""A task whose responses have a heavy tail of lengths: log-normal, the longest of a batch about 20 times the median.

The prompt "7=" asks for the digit 7 again and again; each digit has a mean length of its own, and demonstrations are
geometric around it, so that a tiny model learns nothing but how likely the end is.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

MEDIAN, SIGMA = 8.0, 1.15  # tokens; of the logarithm of a prompt's mean length
LONGEST = 240  # tokens of a response


def parity(response: str) -> float:
    """A reward that no policy can learn and that differs within nearly every group: 1 for an odd length."""
    return float(len(response) % 2)


def write_tail_task(out: Path, *, seed: int = 0, prompts: int = 2048, demonstrations: int = 20_000) -> None:
    """train.jsonl {"prompt", "answer"} and demos.jsonl {"prompt", "response"} into `out`."""
    draws = random.Random(seed)
    out.mkdir(parents=True, exist_ok=True)

    def digit() -> int:
        """Its mean length is MEDIAN exp(SIGMA z) for a normal z of unit variance, cut to ten values."""
        return min(9, max(0, round(draws.gauss(0, 1) * 1.5 + 3)))

    def demonstration(digit: int) -> str:
        mean = MEDIAN * math.exp(SIGMA * (digit - 3) / 1.5)
        length = 1 + int(math.log(1 - draws.random()) / math.log(1 - 1 / max(mean, 1.5)))
        return str(digit) * min(length, LONGEST - 1)

    train = [{"prompt": f"{digit()}=", "answer": ""} for _ in range(prompts)]
    demos = [{"prompt": f"{(d := digit())}=", "response": demonstration(d)} for _ in range(demonstrations)]
    for name, rows in (("train", train), ("demos", demos)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
