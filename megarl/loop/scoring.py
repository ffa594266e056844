"""Responses to rewards. A reward that fails is a fault of its own response only."""

from __future__ import annotations

import math
from typing import Any

from megarl.config import Config
from megarl.data import vocabulary_of
from megarl.loop.sampler import Rollout
from megarl.observe.trace import phase
from megarl.reward.inputs import RewardInput, Texts
from megarl.reward.pool import Score, Scorer


class RewardScorer:
    """Every rank has one; only a rank that fetches responses starts reward processes."""

    def __init__(self, config: Config, tokenizer: Any, *, fetches: bool) -> None:
        self._texts = Texts(tokenizer, config.data.thinking_tags, vocabulary_of(config, tokenizer).ends)
        self._scorer = Scorer(config.data) if fetches else None
        self._stops = config.train.on_bad_batch == "stop"

    def score(self, rollouts: list[Rollout]) -> list[Score]:
        """One score a rollout, NaN without a fault where the answer is not known. Under train.on_bad_batch stop nothing
        is scored after the first fault.
        """
        if self._scorer is None:
            return []
        known = [self._input(rollout) for rollout in rollouts if rollout.prompt.has_answer]
        with phase("reward"):
            scores = iter(self._scorer.score(known, stop_at_first=self._stops))
        return [next(scores) if rollout.prompt.has_answer else Score(math.nan) for rollout in rollouts]

    def _input(self, rollout: Rollout) -> RewardInput:
        response, prompt = rollout.response, rollout.prompt
        return self._texts.input(
            response.tokens.tolist(), response.prompt_len, prompt.text, prompt.answer, prompt.row, response.truncated
        )

    def close(self) -> None:
        if self._scorer is not None:
            self._scorer.close()
