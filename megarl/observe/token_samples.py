"""rollouts/step_N.json: the responses of rollouts/step_N.txt token by token, with what both engines said of each."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from megarl.observe.samples import Sample

TOKENS = 1024  # of a response; the rest is counted
JOINED = 8  # tokens at most that make one piece, where each alone is no whole character
Decode = Callable[[list[int]], str]


def pieces(tokens: Sequence[int], decode: Decode) -> tuple[list[str], list[int]]:
    """(the text as pieces, how many tokens each is made of): one token a piece, but for characters cut in bytes.

    A token is decoded after itself, since a decoder may strip the space before the first token of a text.
    """
    texts: list[str] = []
    sizes: list[int] = []
    start = 0
    while start < len(tokens):
        for size in range(1, JOINED + 1):
            text = _after_itself(tuple(tokens[start : start + size]), decode)
            if "\ufffd" not in text or start + size >= len(tokens):
                break
        else:
            size = 1
            text = decode([tokens[start]])
        texts.append(text)
        sizes.append(size)
        start += size
    return texts, sizes


@lru_cache(maxsize=2**15)  # the same pieces come in every step
def _after_itself(part: tuple[int, ...], decode: Decode) -> str:
    return decode([*part, *part])[len(decode([*part])) :]


def write_token_samples(
    run_dir: Path, step: int, samples: list[Sample], old_logprobs: Mapping[int, list[float]], decode: Decode
) -> None:
    """old_logprobs: number of a sample -> log pi_old of its tokens, where it was computed. A file of the same step is
    replaced.
    """
    folder = run_dir / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(sample, old_logprobs.get(sample.number), decode) for sample in samples]
    (folder / f"step_{step:06}.json").write_text(json.dumps({"step": step, "samples": rows}), "utf-8")


def _row(sample: Sample, old: list[float] | None, decode: Decode) -> dict[str, Any]:
    shown = sample.tokens[:TOKENS]
    texts, sizes = pieces(shown, decode)
    ends = list(itertools.accumulate(sizes))
    chosen = [end - size for end, size in zip(ends, sizes, strict=True)]
    difference = None
    if old is not None and len(old) == len(sample.tokens):
        away = [_finite(a - b) for a, b in zip(old, sample.rollout, strict=True)]
        # of a piece of several tokens, that one where the engines differ most
        chosen = [
            max(range(end - size, end), key=lambda t: abs(away[t])) for end, size in zip(ends, sizes, strict=True)
        ]
        difference = [float(f"{away[t]:.3g}") for t in chosen]
    return {
        "prompt": sample.prompt,
        "answer": sample.answer,
        "reward": _finite(sample.reward),
        "finish_reason": sample.finish_reason,
        "version": sample.version,
        "tokens": len(sample.tokens),
        "cut": len(sample.tokens) - len(shown),
        "pieces": texts,
        "rollout": [round(_finite(sample.rollout[t]), 4) for t in chosen],
        "difference": difference,
    }


def _finite(value: float) -> float:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else math.copysign(1e30, value)


def read_token_samples(run_dir: Path, most: int) -> list[dict[str, Any]]:
    """About `most` samples of steps spread over the run, its last step among them, each with its step.

    A file that a crash cut short, or of another version, is passed over.
    """
    files = sorted((run_dir / "rollouts").glob("step_*.json"))
    if not files:
        return []
    each = max(1, len(_samples(files[-1])))
    count = min(len(files), max(1, most // each))
    chosen = {round(i * (len(files) - 1) / max(1, count - 1)) for i in range(count)} | {len(files) - 1}
    return [sample for i in sorted(chosen) for sample in _samples(files[i])]


def _samples(file: Path) -> list[dict[str, Any]]:
    try:
        row = json.loads(file.read_text("utf-8", errors="replace"))
        return [sample | {"step": row["step"]} for sample in row["samples"] if _KEYS <= sample.keys()]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


_KEYS = {"prompt", "answer", "reward", "finish_reason", "version", "tokens", "cut", "pieces", "rollout", "difference"}
