"""A loop of one rank without servers: the engine is real, the responses are made here, since a server cannot be asked
for a NaN or for chosen rewards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megarl.config import Config, load_config  # noqa: E402
from megarl.data import Prompt, load_tokenizer  # noqa: E402
from megarl.engine.build import Engine, build_engine  # noqa: E402
from megarl.engine.parallel import destroy_parallel  # noqa: E402
from megarl.loop.batch import Batch, ScoredRollouts, build_batch  # noqa: E402
from megarl.loop.sampler import Sampler  # noqa: E402
from megarl.loop.scoring import RewardScorer  # noqa: E402
from megarl.rollout.response import Response  # noqa: E402
from tools.tiny_model import make_tiny_model  # noqa: E402

GROUP = 4


class Scripted:
    """In place of a client: the answers of each prompt, in the order in
    which prompts are asked for. An answer is its text.
    """

    def __init__(self, tokenizer: Any, answers: list[list[str]]) -> None:
        self.tokenizer, self.answers = tokenizer, iter(answers)
        self.mu, self.version = -0.5, 0
        self.nan: tuple[int, int] | None = None  # (prompt, response) whose third log-probability is NaN

    def generate(self, prompts: list[list[int]], n: int, *args: Any, **kwargs: Any) -> list[list[Response]]:
        return [
            [self._response(prompt, text, (p, i)) for i, text in enumerate(next(self.answers))]
            for p, prompt in enumerate(prompts)
        ]

    def _response(self, prompt: list[int], text: str, place: tuple[int, int]) -> Response:
        tokens = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        logprobs = np.full(len(tokens), self.mu, np.float32)
        if place == self.nan:
            logprobs[2] = np.nan
        spans = [{"version": self.version, "start": 0, "end": len(tokens)}] if tokens else []
        reason: Any = "length" if len(tokens) >= 6 else "stop"
        return Response(np.array([*prompt, *tokens], np.int32), len(prompt), logprobs, None, spans, reason)


def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For a fixture of one module, at whose end the rank leaves its groups."""
    yield make_tiny_model(tmp_path_factory.mktemp("collect") / "model")
    destroy_parallel()


class Loop:
    """The part of megarl.train that makes one batch."""

    def __init__(self, engine: Engine, config: Config, client: Scripted, tokenizer: Any) -> None:
        self.config, self.engine, self.tokenizer = config, engine, tokenizer
        self.sampler = Sampler(config, engine, client, tokenizer)  # type: ignore[arg-type]
        self.scorer = RewardScorer(config, tokenizer, fetches=True)


def build(folder: Path, answers: list[list[str]], *keys: str) -> tuple[Engine, Loop, Scripted]:
    config = load_config(
        None,
        [
            f"model.path={folder}",
            "data.reward=digit_sum",
            "data.prompts=train.jsonl",
            "replay.metrics=false",
            "replay.mode=none",
            *keys,
        ],
    )
    config.batch.prompts, config.batch.group = 4, GROUP
    engine = build_engine(config, optimizer_steps=4)
    tokenizer = load_tokenizer(config.model)
    client = Scripted(tokenizer, answers)
    return engine, Loop(engine, config, client, tokenizer), client


def collect(loop: Loop, *, to_learn: bool = True, unanswered: tuple[int, ...] = ()) -> tuple[Batch, list[int]]:
    """The batch, and the lines of the prompts drawn for it. unanswered: lines whose answer nobody knows."""
    drawn: list[int] = []
    rollouts = ScoredRollouts(loop.config, loop.engine.model.parallel, steps_done=0)
    while wanted := rollouts.wanted():
        lines = range(len(drawn) + 1, len(drawn) + wanted + 1)
        drawn.extend(lines)
        prompts = [
            Prompt(loop.tokenizer.encode("12="), "3", "12=", line, has_answer=line not in unanswered) for line in lines
        ]
        sampled = loop.sampler.sample(prompts, rollouts.groups, 0)
        rollouts.add(sampled, loop.scorer.score(sampled.rollouts))
    return build_batch(rollouts, loop.engine, 0, to_learn=to_learn), drawn


MIXED, ALL, NONE = ["123", "124", "3", "4"], ["3", "13", "123", "3"], ["4", "14", "124", "4"]


def groups_of(batch: Batch) -> list[list[int]]:
    return [
        sorted({int(g) for pack in part for g in pack.rollout.group_ids.tolist() if g >= 0})
        for part in batch.minibatches
    ]
