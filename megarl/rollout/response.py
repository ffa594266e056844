"""What a rollout brings back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


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
