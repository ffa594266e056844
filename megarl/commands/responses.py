"""Responses of the rollout servers to many prompts, without the training engine: what `megarl generate` and `megarl
eval` share.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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
from megarl.rollout.client import RolloutClient
from megarl.rollout.fleet import Fleet
from megarl.rollout.response import Response

CONNECTIONS = 8  # requests that a server has at the same time: the end of one must not empty it


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


def respond(config: Config, tokenizer: Any, prompts: list[Prompt], n: int, temperature: float) -> Iterator[Answered]:
    """`n` responses to each prompt, in the order of the prompts, with their rewards. Shows how far it is."""
    ends = vocabulary_of(config, tokenizer).ends
    texts = Texts(tokenizer, config.data.thinking_tags, ends)
    scorer = Scorer(config.data) if any(prompt.has_answer for prompt in prompts) else None
    dist.init_process_group("gloo")
    fleet = Fleet(config, torch.device("cpu"), is_ingest=True)
    shown = Rows("responses", len(prompts) * n)
    try:
        announce(f"sampling {plural(len(prompts) * n, 'response')} to {plural(len(prompts), 'prompt')}")
        with fleet.watched(), _asking(fleet, config, prompts, n, temperature, list(ends)) as groups:
            for prompt, group in zip(prompts, groups, strict=True):
                inputs = [
                    texts.input(r.tokens, r.prompt_len, prompt.text, prompt.answer, prompt.row, _is_cut(r))
                    for r in group
                ]
                scored = scorer.score(inputs) if scorer and prompt.has_answer else []
                yield Answered(prompt, group, [given.response for given in inputs], scored)
                shown.add(n)
    finally:
        shown.close()
        if scorer is not None:
            scorer.close()
        fleet.close()
    dist.destroy_process_group()


def _is_cut(response: Response) -> bool:
    return response.finish_reason == "length"


@contextmanager
def _asking(
    fleet: Fleet, config: Config, prompts: list[Prompt], n: int, temperature: float, stop: list[int]
) -> Iterator[Iterator[list[Response]]]:
    """The groups, prompt by prompt. Every server has about as many responses at work as it decodes at the same time."""
    share = max(1, config.rollout.max_num_seqs // (n * CONNECTIONS))  # prompts of one request
    clients: queue.SimpleQueue[RolloutClient] = queue.SimpleQueue()
    for client in [RolloutClient([worker], config.rollout.request_timeout_s) for worker in fleet.workers * CONNECTIONS]:
        clients.put(client)

    def ask(first: int) -> list[list[Response]]:
        client = clients.get()
        try:
            tokens = [prompt.tokens for prompt in prompts[first : first + share]]
            longest, seed = config.rollout.max_new_tokens, config.run.seed + first * n
            return client.generate(tokens, n, temperature, longest, stop, seed=seed)
        finally:
            clients.put(client)

    pool = ThreadPoolExecutor(clients.qsize(), "rollout")
    try:
        parts: list[Future[list[list[Response]]]] = [pool.submit(ask, i) for i in range(0, len(prompts), share)]
        yield (group for part in parts for group in part.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
