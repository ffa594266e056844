"""rollouts/step_N.txt: a few responses of a step, for people to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One response. tokens: its token ids, without the prompt's. rollout: log mu of each. version: the weight version
    of the last one. number: of the response in its batch.
    """

    prompt: str
    tokens: list[int]
    answer: str
    reward: float
    finish_reason: str
    version: int
    rollout: list[float]
    number: int


def write_samples(run_dir: str | Path, step: int, samples: list[Sample], decode: Callable[[list[int]], str]) -> Path:
    """Writes the samples of one step; returns the file. A file of the same step is replaced."""
    folder = Path(run_dir) / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06}.txt"
    blocks = [_block(i, sample, decode(sample.tokens)) for i, sample in enumerate(samples, 1)]
    path.write_text("\n".join(blocks), "utf-8", "backslashreplace")
    return path


def _block(number: int, sample: Sample, response: str) -> str:
    head = (
        f"=== {number}: reward {sample.reward:g}, answer {sample.answer!r}, {len(sample.tokens)} tokens, "
        f"ended by {sample.finish_reason}, weights {sample.version}"
    )
    return f"{head}\n--- prompt\n{sample.prompt}\n--- response\n{response}\n"
