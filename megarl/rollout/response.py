"""What a rollout brings back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megarl.rollout.wire import decode


@dataclass
class Response:
    """One sampled continuation. T = len(tokens), L = MoE layers in global order, K = experts a token.

    logprobs: log mu at the sampling temperature over the whole vocabulary (docs/objective.md).
    routes: row t holds the experts chosen when token t was the input; the last token has no row (docs/routing.md).
    """

    tokens: np.ndarray  # int32 [T], prompt and response; an end-of-sequence token that was sampled is included
    prompt_len: int
    logprobs: np.ndarray  # float32 [T - prompt_len]
    routes: np.ndarray | None  # uint8 or uint16 [T - 1, L, K]
    weight_versions: list[dict[str, int]]  # spans {version, start, end} over response tokens
    finish_reason: Literal["stop", "length"]

    @property
    def truncated(self) -> bool:
        """Whether it ended at the limit of its length, and not by itself."""
        return self.finish_reason == "length"


def responses_of(body: bytes | memoryview, prompts: list[list[int]], n: int) -> list[list[Response]]:
    """An answer of /megarl/generate as n responses to each prompt; log-probabilities and routes are views of `body`."""
    header, arrays = decode(body)
    routes = arrays.get("routes")
    groups: list[list[Response]] = []
    token = row = number = 0
    for prompt in prompts:
        head = np.array(prompt, np.int32)
        group = []
        for _ in range(n):
            length = header["lengths"][number]
            rows = len(prompt) + length - 1
            spans = [
                {"version": version, "start": start, "end": end} for version, start, end in header["versions"][number]
            ]
            group.append(
                Response(
                    tokens=np.concatenate([head, arrays["tokens"][token : token + length]]),
                    prompt_len=len(prompt),
                    logprobs=arrays["logprobs"][token : token + length],
                    routes=None if routes is None else routes[row : row + rows],
                    weight_versions=spans,
                    finish_reason=header["finish"][number],
                )
            )
            token, row, number = token + length, row + rows, number + 1
        groups.append(group)
    return groups
