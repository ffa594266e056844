"""rollouts/step_N.json: the responses of rollouts/step_N.txt token by token, with what both engines said of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
            part = list(tokens[start : start + size])
            text = decode(part + part)[len(decode(part)) :]
            if "\ufffd" not in text or start + size >= len(tokens):
                break
        else:
            size = 1
            text = decode([tokens[start]])
        texts.append(text)
        sizes.append(size)
        start += size
    return texts, sizes


def write_token_samples(run_dir: Path, step: int, samples: list[dict[str, Any]], decode: Decode) -> None:
    """samples: each with prompt, answer, reward, finish_reason, version, tokens (the response's ids), rollout (log mu
    of each) and trainer (log pi_old of each, or None where it was not computed). A file of the same step is replaced.
    """
    folder = run_dir / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(sample, decode) for sample in samples]
    (folder / f"step_{step:06}.json").write_text(json.dumps({"step": step, "samples": rows}), "utf-8")


def _row(sample: dict[str, Any], decode: Decode) -> dict[str, Any]:
    tokens, mu, old = sample["tokens"][:TOKENS], sample["rollout"], sample["trainer"]
    texts, sizes = pieces(tokens, decode)
    rollout: list[float] = []
    difference: list[float] = []
    at = 0
    for size in sizes:  # of a piece of several tokens, that one where the engines differ most
        span = range(at, at + size)
        chosen = max(span, key=lambda t: abs(old[t] - mu[t])) if old is not None else at
        rollout.append(round(float(mu[chosen]), 4))
        if old is not None:
            difference.append(float(f"{old[chosen] - mu[chosen]:.3g}"))
        at += size
    return {
        **{key: sample[key] for key in ("prompt", "answer", "reward", "finish_reason", "version")},
        "tokens": len(sample["tokens"]),
        "cut": len(sample["tokens"]) - len(tokens),
        "pieces": texts,
        "rollout": rollout,
        "difference": difference if old is not None else None,
    }


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
