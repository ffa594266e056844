"""rollouts/step_N.txt: a few responses of a step, for people to read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One response. `tokens` counts the response's tokens; `version` is the weight version of its last one."""

    prompt: str
    response: str
    answer: str
    reward: float
    tokens: int
    finish_reason: str
    version: int


def write_samples(run_dir: str | Path, step: int, samples: list[Sample]) -> Path:
    """Writes the samples of one step; returns the file. A file of the same step is replaced."""
    folder = Path(run_dir) / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06}.txt"
    path.write_text("\n".join(_block(i, sample) for i, sample in enumerate(samples, 1)), "utf-8", "backslashreplace")
    return path


def _block(number: int, sample: Sample) -> str:
    head = (
        f"=== {number}: reward {sample.reward:g}, answer {sample.answer!r}, {sample.tokens} tokens, "
        f"ended by {sample.finish_reason}, weights {sample.version}"
    )
    return f"{head}\n--- prompt\n{sample.prompt}\n--- response\n{sample.response}\n"
