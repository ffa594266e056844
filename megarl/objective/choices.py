"""What an objective is made of, by name. A new choice is one entry here and one function; docs/extending.md shows it.

From outside megarl the name is the function's dotted path, e.g. `weight: my_rules.capped`; nothing is registered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from megarl.dotted import import_dotted

# part of an objective -> name in the configuration -> the function, as module.function of this package.
# advantage   (rewards [n], groups: Segments, config) -> A [n]
# weight      (tokens: Tokens, config) -> Factor: w of each of the R unmasked tokens
# clip        (tokens: Tokens, config) -> bool [R]: the mask M, false where a token is dropped
# correction  (tokens: Tokens, config) -> Factor: c of each of the R unmasked tokens
CHOICES: Mapping[str, Mapping[str, str]] = {
    "advantage": {
        "reward": "advantage.reward",
        "mean": "advantage.mean",
        "mean_std": "advantage.mean_std",
        "leave_one_out": "advantage.leave_one_out",
        "global_std": "advantage.global_std",
        "gae": "advantage.reward",  # the critic spreads it over the tokens: advantage.gae
    },
    "weight": {
        "one": "weight.one",
        "is": "weight.importance",
        "ratio": "weight.ratio",
        "clipped_ratio": "weight.clipped_ratio",
        "sequence_ratio": "weight.sequence_ratio",
        "soft_gate": "weight.soft_gate",
    },
    "clip": {
        "none": "clip.none",
        "ratio": "clip.ratio",
        "sequence_ratio": "clip.sequence_ratio",
        "tv": "clip.tv",
    },
    "correction": {
        "none": "correction.none",
        "token_truncation": "correction.token_truncation",
        "token_mask": "correction.token_mask",
        "sequence_truncation": "correction.sequence_truncation",
        "sequence_mask": "correction.sequence_mask",
        "geometric_rejection": "correction.geometric_rejection",
    },
}


@functools.cache
def find(part: str, name: str) -> Callable[..., Any]:
    """The function of one part of an objective: a built-in one by its name, any other by its dotted path.

    Raises UserError, one line, where there is none.
    """
    path = CHOICES[part].get(name)
    return import_dotted(f"objective.{part}", f"{__package__}.{path}" if path else name, "function", CHOICES[part])
