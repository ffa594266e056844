"""The quickstart's task: the sum of a prompt's digits modulo 10, with running sums as a scratchpad.

    python tools/digit_sum.py --out DIR      train.jsonl, valid.jsonl {"prompt", "answer"}; demos.jsonl {"prompt",
                                             "response"}

The prompt "38412=" has the answer "8" and the full scratchpad "31568": the sum of the first 1,
2, ... 5 digits, each modulo 10. The defaults are calibrated: 500 steps of 64 demonstrations
leave the tiny model with a reward of about 0.3 at temperature 1 (a slip in five in every step),
and with the right sum as its most probable path, so that 60 to 100 steps of RL suffice.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path


def running_sums(digits: str, rng: random.Random | None = None, noise: float = 0.0) -> str:
    """Running sums of `digits` modulo 10; with probability `noise` a
    step adds a wrong number, which later steps carry on.
    """
    total, sums = 0, ""
    for digit in digits:
        slip = rng.randint(1, 9) if rng is not None and rng.random() < noise else 0
        total = (total + int(digit) + slip) % 10
        sums += str(total)
    return sums


def demonstration(digits: str, rng: random.Random, noise: float, shorten: float) -> str:
    """A noisy scratchpad; with probability `shorten` only a tail of it,
    so that lengths vary and the model has a bad habit to lose.
    """
    response = running_sums(digits, rng, noise)
    return response[rng.randint(1, len(digits) - 1) :] if rng.random() < shorten else response


def write_task(
    out: str | Path,
    *,
    seed: int = 0,
    digits: int = 5,
    noise: float = 0.2,
    shorten: float = 0.1,
    train: int = 4096,
    valid: int = 256,
    demos: int = 20_000,
) -> Path:
    """Writes the three files into `out`, the same bytes for the same
    arguments; train and valid prompts are distinct and disjoint.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    numbers = [f"{number:0{digits}d}" for number in rng.sample(range(10**digits), train + valid)]
    rows = [{"prompt": f"{number}=", "answer": running_sums(number)[-1]} for number in numbers]
    _write(out / "train.jsonl", rows[:train])
    _write(out / "valid.jsonl", rows[train:])
    held_out = set(numbers[train:])
    rows = []
    while len(rows) < demos:
        number = f"{rng.randrange(10**digits):0{digits}d}"
        if number not in held_out:
            rows.append({"prompt": f"{number}=", "response": demonstration(number, rng, noise, shorten)})
    _write(out / "demos.jsonl", rows)
    return out


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.rename(path)  # a file that is there is whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digits", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.2, help="probability of a slip, per step of the scratchpad")
    arguments = parser.parse_args()
    print(write_task(arguments.out, seed=arguments.seed, digits=arguments.digits, noise=arguments.noise))
