"""One plain line for each phase of a command that takes more than a moment: what it waits for now."""

from __future__ import annotations

import os


def announce(text: str) -> None:
    """Prints `text`, on the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def plural(count: int, noun: str) -> str:
    """1 rank, 2 ranks."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


ANSWERED = "megarl: the rollout server answers"  # in a worker's log: from then on a failure of its may be mended


def answers_line(index: int, url: str) -> str:
    return f"{ANSWERED}: worker {index}, {url}"
