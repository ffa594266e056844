"""How an engine knows that a batch of requests has come whole: their names say how many it has. Imports no vLLM."""

from __future__ import annotations

import re

_OURS = re.compile(r"megarl-(\d+)of(\d+)-")  # vLLM puts numbers of its own before and after


def name_of(batch: int, size: int, number: int) -> str:
    """Of the request for a prompt. size: responses that the batch asks for; each is a request in the engine."""
    return f"megarl-{batch}of{size}-{number}"


class Arrivals:
    """Of the requests that an idle engine gets."""

    def __init__(self) -> None:
        self._missing: dict[str, int] = {}  # by batch

    def came(self, request: str) -> None:
        if ours := _OURS.search(request):
            batch, size = ours.groups()
            self._missing[batch] = self._missing.get(batch, int(size)) - 1

    @property
    def whole(self) -> bool:
        return not any(left > 0 for left in self._missing.values())
