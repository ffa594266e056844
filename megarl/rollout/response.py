"""What a rollout brings back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megarl.rollout.wire import WHOLE, decode


class CutOff(ValueError):
    """A response that its server did not sample to its end, or without a version of the weights for each token."""


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
    """An answer of /megarl/generate as n responses to each prompt; log-probabilities and routes are views of `body`.
    Raises CutOff.
    """
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
            finish, spans = header["finish"][number], header["versions"][number]
            _refuse_cut_off(finish, spans, length)
            group.append(
                Response(
                    tokens=np.concatenate([head, arrays["tokens"][token : token + length]]),
                    prompt_len=len(prompt),
                    logprobs=arrays["logprobs"][token : token + length],
                    routes=None if routes is None else routes[row : row + rows],
                    weight_versions=[{"version": version, "start": start, "end": end} for version, start, end in spans],
                    finish_reason=finish,
                )
            )
            token, row, number = token + length, row + rows, number + 1
        groups.append(group)
    return groups


def _refuse_cut_off(finish: str, spans: list[list[int]], length: int) -> None:
    if finish not in WHOLE:
        raise CutOff(f"a response of {length} tokens that ended by {finish!r}, not {' or '.join(WHOLE)}")
    ends = [0, *(end for _, _, end in spans)]
    if [start for _, start, _ in spans] != ends[:-1] or ends[-1] != length:
        raise CutOff(f"versions of the weights [version, first, last) {spans} of a response of {length} tokens")
