"""Prompts to the rollout servers, responses back with their log-probabilities, routes and weight versions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megarl.config import Config
from megarl.data import Prompt, vocabulary_of
from megarl.engine.build import Engine
from megarl.errors import Stopped
from megarl.launch.stop import StopRequest
from megarl.observe.trace import enter, phase
from megarl.replay.routes import accept_routes
from megarl.rollout.client import RolloutClient
from megarl.rollout.patience import longest_wait_s
from megarl.rollout.registry import NoServers
from megarl.rollout.response import Response

TRIES = 3  # servers that are lost one after the other by the same prompts end the run


@dataclass(frozen=True)
class Rollout:
    """One response. group: the place of its prompt in the batch; the responses of one group have one number."""

    group: int
    prompt: Prompt
    response: Response


@dataclass(frozen=True)
class Sampled:
    """rollouts: those this rank fetched, group by group. wrong_routes: what is wrong with the first bad routes, in one
    line that names the response; None if nothing is. stopped: that a signal ended the wait for them.
    """

    rollouts: list[Rollout]
    wrong_routes: str | None = None
    stopped: Stopped | None = None


class Sampler:
    """Every rank calls every method; only ingest ranks (one a data-parallel replica) hold a client and talk to the
    servers.

    recover: collective, brings servers that hold the weights where none is left; None where that ends the command.
    """

    recover: Callable[[], None] | None = None

    def __init__(self, config: Config, engine: Engine, client: RolloutClient | None, tokenizer: Any) -> None:
        self.config, self.client = config, client
        self.stop_token_ids = list(vocabulary_of(config, tokenizer).ends)
        self.parallel, self.weight_map = engine.model.parallel, engine.model.weight_map
        self.wants_routes = config.wants_routes and bool(self.weight_map.moe_layers)
        self.wait_s = longest_wait_s(config.rollout.request_timeout_s)  # which is no stall

    def sample(
        self, prompts: Sequence[Prompt], first_group: int, step: int, stop: StopRequest | None = None
    ) -> Sampled:
        """batch.group responses to each prompt; a replica asks for its share. prompts: the same on every rank.

        first_group: number of the first prompt's group. step: rollout steps done before this one; it seeds
        the draw. stop: what may end the wait.
        """
        config = self.config
        seed = (config.run.seed * 1_000_003 + step) * 1_000_003 % 2**31 + first_group * config.batch.group

        def ask() -> list[list[Response]]:
            with phase("rollout", self.wait_s), stop.interruptible() if stop else nullcontext():
                return self._generate(prompts, config.batch.group, config.rollout.temperature, seed)

        try:
            groups = self._served(ask)
        except Stopped as stopped:  # every rank raises it, in ScoredRollouts.add
            return Sampled([], stopped=stopped)
        rollouts = [
            Rollout(first_group + i, prompt, response)
            for (i, prompt), group in zip(self._share(prompts).items(), groups, strict=True)
            for response in group
        ]
        return Sampled(rollouts, self.check_routes(rollouts))

    def sample_for_evaluation(
        self, prompts: Sequence[Prompt], samples: int, temperature: float, stop: StopRequest | None = None
    ) -> list[Rollout]:
        """`samples` responses to each prompt of this replica's share; their routes are not looked at. Stopped, on every
        rank, where a signal ends the wait (stop).
        """

        def ask() -> list[list[Response]]:
            enter("the wait for responses to evaluate", self.wait_s)
            try:
                with stop.interruptible() if stop else nullcontext():
                    return self._generate(prompts, samples, temperature, self.config.run.seed)
            finally:
                enter("evaluate")

        groups = self._served(ask)
        return [
            Rollout(i, prompt, response)
            for (i, prompt), group in zip(self._share(prompts).items(), groups, strict=True)
            for response in group
        ]

    def _generate(self, prompts: Sequence[Prompt], n: int, temperature: float, seed: int) -> list[list[Response]]:
        """n responses to each prompt of this rank's share. seed: of the first response to the first of all prompts."""
        share = self._share(prompts)
        if self.client is None or not share:
            return []
        tokens, first = [prompt.tokens for prompt in share.values()], min(share)
        longest = self.config.rollout.max_new_tokens
        return self.client.generate(
            tokens, n, temperature, longest, self.stop_token_ids, seed + first * n, first, len(prompts)
        )

    def _served(self, ask: Callable[[], list[list[Response]]]) -> list[list[Response]]:
        """Collective: what ask() gives, asked again on the ranks that found no server, once recover() has brought
        others; the same seeds give the same responses. Raises Stopped, on every rank, where a signal came on one.
        """
        if self.recover is None:
            return ask()
        groups: list[list[Response]] | None = None
        for tries_left in reversed(range(TRIES)):
            code, failed = 0, NoServers("a server was lost each time another rank asked it")
            try:
                groups = ask() if groups is None else groups
            except NoServers as none:
                code, failed = 1, none
            except Stopped as stopped:
                code = 1 + stopped.signum
            worst = self._largest(code)
            if worst > 1:
                raise Stopped(worst - 1)
            if not worst:
                return groups or []
            if not tries_left:
                raise failed
            self.recover()
        raise AssertionError

    def _largest(self, code: int) -> int:
        largest = torch.tensor(code)
        # Who asks nobody waits here for all responses: not in NCCL, whose kernel would take a shared GPU's time
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.parallel.host_group)
        return int(largest)

    def _share(self, prompts: Sequence[Prompt]) -> dict[int, Prompt]:
        """Place -> prompt: those that this replica asks for; none on a rank without a client."""
        if self.client is None:
            return {}
        places = np.array_split(np.arange(len(prompts)), self.parallel.layout.dp)[self.parallel.coord.dp]
        return {i: prompts[i] for i in places.tolist()}

    def check_routes(self, rollouts: list[Rollout]) -> str | None:
        """Reduces the responses' routes to MoE layers; what is wrong with the first bad ones."""
        if not self.wants_routes:
            return None
        needed = self.config.replay_mode == "R3" and self.config.replay.on_missing == "error"
        size = self.weight_map
        seen: dict[int, int] = {}
        for rollout in rollouts:
            number = seen[rollout.group] = seen.get(rollout.group, -1) + 1
            response = rollout.response
            try:
                if response.routes is not None:
                    rows = len(response.tokens) - 1
                    response.routes = accept_routes(
                        response.routes, rows, size.moe_layers, size.num_layers, size.num_experts, size.top_k
                    )
                elif needed:
                    raise ValueError(
                        "none, which replay.mode R3 needs; check the worker, or set replay.on_missing=live"
                    )
            except ValueError as wrong:
                name = f"response {number} to the prompt on line {rollout.prompt.line} ({rollout.prompt.text[-40:]!r})"
                return f"routes of {name}: {wrong}; does the rollout worker serve the trainer's model?"
        return None
