"""Responses of the rollout servers to many prompts, without the training engine: what `megarl generate` and `megarl
eval` share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from megarl.announce import announce, plural
from megarl.commands.jsonl import encode_npy
from megarl.config import Config
from megarl.data import Prompt, vocabulary_of
from megarl.observe.progress import Rows
from megarl.reward.inputs import Texts
from megarl.reward.pool import Score, Scorer
from megarl.rollout import dispatch
from megarl.rollout.client import sampling_of
from megarl.rollout.dispatch import Request
from megarl.rollout.fleet import Fleet
from megarl.rollout.response import Response

POLL_S = 1.0  # between two looks whether more may be asked for
AHEAD, AHEAD_WITH_ROUTES = 8, 2  # an answer's routes take a byte a layer and expert, the rest of it 8 bytes a token


@dataclass(frozen=True)
class Answered:
    """A prompt's responses; scores: one each, none where the prompt's answer is not known."""

    prompt: Prompt
    responses: list[Response]
    texts: list[str]
    scores: list[Score]

    def rows(self) -> list[dict[str, Any]]:
        """What people read first, then what `megarl score` reads."""
        scores: Sequence[Score | None] = self.scores or [None] * len(self.responses)
        return [_row(self.prompt, *parts) for parts in zip(self.responses, self.texts, scores, strict=True)]


def _row(prompt: Prompt, response: Response, text: str, score: Score | None) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": prompt.text, "text": text}
    if score is not None:
        row |= {"answer": prompt.answer, "reward": None if score.fault else score.value}
        if score.fault:
            row["reward_fault"] = score.fault
    return row | {
        "finish_reason": response.finish_reason,
        "tokens": response.tokens.tolist(),
        "prompt_len": response.prompt_len,
        "logprobs": response.logprobs.tolist(),
        "routes": None if response.routes is None else encode_npy(response.routes),
        "weight_versions": response.weight_versions,
    }


def respond(
    config: Config, tokenizer: Any, prompts: Sequence[Prompt], n: int, temperature: float
) -> Iterator[Answered]:
    """`n` responses to each prompt, in the order of the prompts, with their rewards. Shows how far it is."""
    ends = vocabulary_of(config, tokenizer).ends
    texts = Texts(tokenizer, config.data.thinking_tags, ends)
    scorer = Scorer(config.data) if any(prompt.has_answer for prompt in prompts) else None
    dist.init_process_group("gloo")
    fleet = Fleet(config, torch.device("cpu"), is_ingest=True)
    shown = Rows("responses", len(prompts) * n)
    try:
        announce(f"sampling {plural(len(prompts) * n, 'response')} to {plural(len(prompts), 'prompt')}")
        with fleet.watched(), _asking(fleet, config, prompts, n, temperature, list(ends)) as batches:
            left = iter(prompts)
            for groups in batches:
                batch = [*islice(left, len(groups))]
                given = [
                    [
                        texts.input(
                            r.tokens.tolist(), r.prompt_len, prompt.text, prompt.answer, prompt.row, r.truncated
                        )
                        for r in group
                    ]
                    for prompt, group in zip(batch, groups, strict=True)
                ]
                known = [
                    each for prompt, inputs in zip(batch, given, strict=True) if prompt.has_answer for each in inputs
                ]
                scores = iter(scorer.score(known) if scorer else [])
                for prompt, group, inputs in zip(batch, groups, given, strict=True):
                    scored = [*islice(scores, n)] if prompt.has_answer else []
                    yield Answered(prompt, group, [each.response for each in inputs], scored)
                    shown.add(n)
    finally:
        shown.close()
        if scorer is not None:
            scorer.close()
        fleet.close()
    dist.destroy_process_group()


@contextmanager
def _asking(
    fleet: Fleet, config: Config, prompts: Sequence[Prompt], n: int, temperature: float, stop: list[int]
) -> Iterator[Iterator[list[list[Response]]]]:
    """The groups in the order of the prompts, as many at a time as have come. Every server has about as many responses
    at work as it decodes at the same time, and answers to no more than AHEAD times as many wait here: for a slow one
    before them, or for the caller.
    """
    assert fleet.client is not None
    dispatcher, done = fleet.client.dispatcher, SimpleQueue[dispatch.Answered]()
    sampling = sampling_of(n, temperature, config.rollout.max_new_tokens, stop)
    ahead = AHEAD_WITH_ROUTES if config.wants_routes else AHEAD
    window = ahead * len(fleet.client.servers) * max(config.rollout.max_num_seqs // n, 1)
    asked: dict[Request, int] = {}  # -> the number of its prompt
    early: dict[int, list[Response]] = {}

    def ask(number: int) -> None:
        request = Request([prompts[number].tokens], n, sampling, [config.run.seed + number * n], done)
        asked[request] = number
        dispatcher.submit(request)

    def batches() -> Iterator[list[list[Response]]]:
        first = last = 0  # not handed on yet; not asked for yet
        while first < len(prompts):
            while last < min(first + window, len(prompts)):
                ask(last)
                last += 1
            for answered in dispatch.take(done, POLL_S):
                if answered.error:
                    raise answered.error
                (early[asked.pop(answered.request)],) = answered.groups
            ready = [early.pop(number) for number in takewhile(early.__contains__, range(first, last))]
            first += len(ready)
            if ready:
                yield ready

    try:
        yield batches()
    finally:
        dispatcher.abandon([*asked])
