"""One step's rollouts: prompts to the servers, responses to rewards and advantages, tensors to the ranks that train them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megarl.config import Config
from megarl.data import Prompt
from megarl.engine.batch import Meta, Pack, assign
from megarl.engine.build import Engine, route_shape
from megarl.engine.exchange import exchange, gather_metas, minibatches
from megarl.objective import advantages, denominators
from megarl.replay.routes import accept_routes
from megarl.report.samples import Sample
from megarl.report.trace import phase
from megarl.reward import get_reward
from megarl.rollout.client import RolloutClient
from megarl.rollout.response import Response

Values = dict[str, float | list[float]]


@dataclass
class Batch:
    """minibatches: this rank's packs of each optimizer step. samples: some responses to read, on rank 0."""

    minibatches: list[list[Pack]]
    metrics: Values
    samples: list[Sample]


class Collector:
    """Every rank calls every method; only ingest ranks (one a data-parallel replica) hold a client and talk to the servers."""

    def __init__(self, config: Config, engine: Engine, client: RolloutClient | None, tokenizer: Any) -> None:
        self.config, self.engine, self.client, self.tokenizer = config, engine, client, tokenizer
        self.parallel = engine.model.parallel
        self.reward = get_reward(config.data.reward)
        self.routes = route_shape(engine.model) if config.wants_routes and engine.model.weight_map.moe_layers else None

    def collect(self, prompts: list[Prompt], step: int, steps_done: int) -> Batch:
        """Rolls out the whole batch of `prompts` and lays it out for training. steps_done: optimizer steps before this step's first."""
        config, start = self.config, time.perf_counter()
        mine = np.array_split(np.arange(len(prompts)), self.parallel.layout.dp)[self.parallel.coord.dp]
        seed = (config.run.seed * 1_000_003 + step) * 1_000_003 % 2**31
        seed += int(mine[0]) * config.batch.group
        with phase("rollout"):
            groups = self._generate([prompts[i] for i in mine], config.batch.group, config.rollout.temperature, seed)
        held = [(int(i), response) for i, group in zip(mine, groups) for response in group]
        with phase("reward"):
            rewards = [self._score(prompts[i], response) for i, response in held]
        fault = self._accept_routes(held, prompts)
        metas = gather_metas([self._meta(i, response, reward) for (i, response), reward in zip(held, rewards)], self.parallel, fault)
        rollout_s = time.perf_counter() - start

        numbers = [n for n, meta in enumerate(metas) if meta.owner == self.parallel.coord.rank]
        responses = dict(zip(numbers, (response for _, response in held)))
        packs, received = self._lay_out(metas, responses)
        metrics = self._metrics(metas, steps_done)
        metrics |= {"time/rollout_s": rollout_s}
        metrics |= self._route_metrics(metas, held, received)
        samples = [self._sample(prompts[i], response, reward) for (i, response), reward in zip(held, rewards)][: config.run.rollout_samples]
        return Batch(packs, metrics, samples)

    def evaluate(self, prompts: list[Prompt], samples: int, temperature: float) -> Values:
        """mean@k and pass@k over validation prompts, k = samples; the same reward, a temperature of its own."""
        mine = np.array_split(np.arange(len(prompts)), self.parallel.layout.dp)[self.parallel.coord.dp]
        chosen = [prompts[i] for i in mine]
        groups = self._generate(chosen, samples, temperature, seed=self.config.run.seed)
        scores = [[self._score(prompt, response) for response in group] for prompt, group in zip(chosen, groups)]
        everyone: list[list[list[float]]] = [[] for _ in range(self.parallel.layout.world)]
        dist.all_gather_object(everyone, scores)
        rows = np.array([group for rank in everyone for group in rank])
        return {"eval/mean_at_k": float(rows.mean()), "eval/pass_at_k": float((rows.max(1) > 0).mean()), "eval/k": float(samples)}

    def _generate(self, prompts: list[Prompt], n: int, temperature: float, seed: int) -> list[list[Response]]:
        if self.client is None or not prompts:
            return []
        tokens = [prompt.tokens for prompt in prompts]
        stop = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return self.client.generate(tokens, n, temperature, self.config.rollout.max_new_tokens, stop, seed=seed)

    def _score(self, prompt: Prompt, response: Response) -> float:
        text = self.tokenizer.decode(response.tokens[response.prompt_len :], skip_special_tokens=True)
        return self.reward(text, prompt.answer, prompt.text)

    def _meta(self, prompt: int, response: Response, reward: float) -> Meta:
        return Meta(
            prompt=prompt,
            prompt_len=response.prompt_len,
            tokens=len(response.tokens),
            reward=reward,
            version=min(span["version"] for span in response.weight_versions),
            owner=self.parallel.coord.rank,
            has_routes=response.routes is not None,
            truncated=response.finish_reason == "length",
        )

    def _accept_routes(self, held: list[tuple[int, Response]], prompts: list[Prompt]) -> str | None:
        """Reduces the responses' routes to MoE layers; what is wrong with the first bad ones, in one line that names the response."""
        if self.routes is None:
            return None
        weight_map, needed = self.engine.model.weight_map, self.config.replay_mode == "R3" and self.config.replay.on_missing == "error"
        size = weight_map.moe_layers, weight_map.num_layers, weight_map.num_experts, weight_map.top_k
        for number, (i, response) in enumerate(held):
            nth = sum(other == i for other, _ in held[:number])
            name = f"response {nth} to the prompt on line {prompts[i].line} ({prompts[i].text[-40:]!r})"
            try:
                if response.routes is not None:
                    response.routes = accept_routes(response.routes, len(response.tokens) - 1, *size)
                elif needed:
                    raise ValueError("none, which replay.mode R3 needs; check the worker, or set replay.on_missing=live")
            except ValueError as wrong:
                return f"routes of {name}: {wrong}; does the rollout worker serve the trainer's model?"
        return None

    def _lay_out(self, metas: list[Meta], responses: dict[int, Response]) -> tuple[list[list[Pack]], int]:
        """One deterministic assignment response -> (mini-batch, replica, pack) for the pi_old pass and all updates; then the move."""
        layout, config = self.parallel.layout, self.config
        rewards = torch.tensor([meta.reward for meta in metas], dtype=torch.float64)
        prompts = torch.tensor([meta.prompt for meta in metas])
        advantage = advantages(rewards, prompts, config.objective)
        lengths = torch.tensor([meta.tokens - meta.prompt_len for meta in metas])
        divisor = torch.ones(len(metas), dtype=torch.float64)
        assignment: list[list[list[int]]] = [[] for _ in range(layout.dp)]
        counts = []
        for members in minibatches(metas, config.batch.prompts, config.batch.minibatches):
            chosen = torch.tensor(members)
            divisor[chosen] = denominators(lengths[chosen], prompts[chosen], config.objective)
            rows = [metas[i].rows for i in members]
            packed = assign(rows, layout.dp, config.engine.micro_batch_tokens, multiple=layout.pp if layout.vpp > 1 else 1)
            counts.append(len(packed[0]))
            for replica, packs in enumerate(packed):
                assignment[replica] += [[members[i] for i in pack] for pack in packs]
        packs, received = exchange(assignment, metas, advantage, divisor, responses, self.parallel, self.routes)
        edges = np.cumsum([0, *counts])
        return [packs[a:b] for a, b in zip(edges, edges[1:])], received

    def _metrics(self, metas: list[Meta], steps_done: int) -> Values:
        rewards = np.array([meta.reward for meta in metas])
        groups = np.array([meta.prompt for meta in metas])
        lengths = np.array([meta.tokens - meta.prompt_len for meta in metas])
        passed = [rewards[groups == group].max() > 0 for group in np.unique(groups)]
        return {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "reward/pass_at_g": float(np.mean(passed)),
            "response/length_mean": float(lengths.mean()),
            "response/truncated_frac": float(np.mean([meta.truncated for meta in metas])),
            "response/tokens": float(lengths.sum()),
            "version/rollout_lag_max": float(steps_done - min(meta.version for meta in metas)),
        }

    def _route_metrics(self, metas: list[Meta], held: list[tuple[int, Response]], received: int) -> Values:
        if self.routes is None:
            return {}
        nbytes = sum(r.routes.nbytes for _, r in held if r.routes is not None)
        ingested = torch.tensor([nbytes, received], dtype=torch.float64, device=self.parallel.device.device)
        biggest = ingested[1:].clone()
        dist.all_reduce(ingested)
        dist.all_reduce(biggest, op=dist.ReduceOp.MAX)
        missing = sum(meta.rows for meta in metas if not meta.has_routes)
        return {
            "routing/bytes_ingested": float(ingested[0]),
            "routing/bytes_received_per_rank": float(biggest),
            "routing/missing_rows": float(missing),
        }

    def _sample(self, prompt: Prompt, response: Response, reward: float) -> Sample:
        return Sample(
            prompt=prompt.text,
            response=self.tokenizer.decode(response.tokens[response.prompt_len :]),
            answer=prompt.answer,
            reward=reward,
            tokens=len(response.tokens) - response.prompt_len,
            finish_reason=response.finish_reason,
            version=response.weight_versions[-1]["version"],
        )
