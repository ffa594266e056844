"""One step's rollouts: prompts to the servers, responses to rewards and
advantages, tensors to the ranks that train them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.config import Config
from megarl.data import Prompt
from megarl.engine.batch import Meta, Pack, assign
from megarl.engine.build import Engine, route_shape
from megarl.engine.exchange import exchange, gather_metas, minibatches
from megarl.errors import UserError
from megarl.objective import advantages, denominators, informative, overlong_penalty
from megarl.observe.samples import Sample
from megarl.observe.trace import phase
from megarl.replay.routes import accept_routes
from megarl.reward.inputs import Texts
from megarl.reward.pool import Score, Scorer
from megarl.rollout.client import RolloutClient
from megarl.rollout.response import Response

Values = dict[str, float | list[float]]


@dataclass
class Batch:
    """minibatches: this rank's packs of each optimizer step, none where there is nothing to learn or something is bad.

    names: how to name response i of the batch (Pack.responses) to a user. samples: some responses to read, on rank 0.
    """

    minibatches: list[list[Pack]]
    names: list[str]
    metrics: Values
    samples: list[Sample]


@dataclass
class Rollout:
    """metas: of every response sampled for a step, on every rank, in
    order of their groups. held: those this rank fetched.
    """

    metas: list[Meta]
    held: list[tuple[Prompt, Response]]


class Collector:
    """Every rank calls every method; only ingest ranks (one a
    data-parallel replica) hold a client and talk to the servers.
    """

    def __init__(self, config: Config, engine: Engine, client: RolloutClient | None, tokenizer: Any) -> None:
        self.config, self.engine, self.client, self.tokenizer = config, engine, client, tokenizer
        self.parallel = engine.model.parallel
        self.texts = Texts(tokenizer, config.data.thinking_tags)
        self.scorer = Scorer(config.data) if client is not None and self.parallel.is_ingest else None
        self.routes = route_shape(engine.model) if config.wants_routes and engine.model.weight_map.moe_layers else None

    def close(self) -> None:
        if self.scorer is not None:
            self.scorer.close()

    def collect(
        self, draw: Callable[[int], list[Prompt]], step: int, steps_done: int, *, to_learn: bool = True
    ) -> Batch:
        """Rolls out a batch and lays it out for training. draw(k): the next k prompts, the same on every rank.

        Groups that teach nothing stay, go, or are replaced by others for up to batch.max_refills further rollouts
        (batch.equal_groups). reward/* and response/* are of everything that was sampled. steps_done: optimizer steps
        before this step's first. to_learn: leave out a batch of which nothing can be learnt.
        """
        batch, start = self.config.batch, time.perf_counter()
        rollout = Rollout([], [])
        drawn = 0
        for _ in range(1 + (batch.max_refills if batch.equal_groups == "refill" else 0)):
            wanted = batch.prompts - len(self._groups(rollout.metas)[0])
            if not wanted or any(meta.fault for meta in rollout.metas):
                break
            self._roll_out(rollout, draw(wanted), drawn, step, steps_done)
            drawn += wanted
        rollout_s = time.perf_counter() - start

        metas, bad = rollout.metas, self._bad(rollout.metas, step)
        groups, dull = self._groups(metas)
        objective = self.config.objective
        if bad or (to_learn and len(dull) == drawn and not (objective.kl_coef or objective.entropy_coef)):
            groups = []
            if not bad and self.parallel.is_main:
                print(
                    f"step {step + 1}: nothing to learn, in each of {drawn} groups all rewards are equal; no update",
                    flush=True,
                )
        numbers = [n for n, meta in enumerate(metas) if meta.owner == self.parallel.coord.rank]
        responses = dict(zip(numbers, (response for _, response in rollout.held)))
        packs, received = self._lay_out(metas, groups, responses)
        metrics = self._metrics(metas, steps_done)
        metrics |= {
            "time/rollout_s": rollout_s,
            "batch/groups": float(len(groups)),
            "batch/equal_groups": float(len(dull)),
        }
        metrics |= {"batch/refilled_groups": float(drawn - batch.prompts), "batch/bad_samples": float(bad)}
        metrics |= self._route_metrics(metas, rollout.held, received)
        pairs = [(metas[n], *pair) for n, pair in zip(numbers, rollout.held)]
        samples = [
            self._sample(prompt, response, meta.reward)
            for meta, prompt, response in pairs[: self.config.run.rollout_samples]
        ]
        return Batch(packs, [self._name(metas, n) for n in range(len(metas))], metrics, samples)

    def evaluate(self, prompts: list[Prompt], samples: int, temperature: float) -> Values:
        """mean@k and pass@k over validation prompts, k = samples; the
        same reward (0 where it fails), a temperature of its own.
        """
        mine = np.array_split(np.arange(len(prompts)), self.parallel.layout.dp)[self.parallel.coord.dp]
        chosen = [prompts[i] for i in mine]
        groups = self._generate(chosen, samples, temperature, seed=self.config.run.seed)
        scored = self._score([(prompt, response) for prompt, group in zip(chosen, groups) for response in group])
        everyone: list[list[tuple[float, str]]] = [[] for _ in range(self.parallel.layout.world)]
        dist.all_gather_object(everyone, scored)
        rows = np.array([0.0 if fault else value for rank in everyone for value, fault in rank]).reshape(-1, samples)
        faults = sum(bool(fault) for rank in everyone for _, fault in rank)
        values = {
            "eval/mean_at_k": float(rows.mean()),
            "eval/pass_at_k": float((rows.max(1) > 0).mean()),
            "eval/k": float(samples),
        }
        return {**values, "eval/bad_samples": float(faults)}

    def _roll_out(self, rollout: Rollout, prompts: list[Prompt], first: int, step: int, steps_done: int) -> None:
        """Adds a group for each prompt, numbered from `first`."""
        config = self.config
        mine = np.array_split(np.arange(len(prompts)), self.parallel.layout.dp)[self.parallel.coord.dp]
        seed = (config.run.seed * 1_000_003 + step) * 1_000_003 % 2**31 + (
            first + int(mine[0]) if len(mine) else 0
        ) * config.batch.group
        with phase("rollout"):
            groups = self._generate([prompts[i] for i in mine], config.batch.group, config.rollout.temperature, seed)
        held = [(first + int(i), prompts[i], response) for i, group in zip(mine, groups) for response in group]
        with phase("reward"):
            scored = self._score([(prompt, response) for _, prompt, response in held])
        wrong_routes = self._accept_routes(held)
        metas = [self._meta(*what, *score, steps_done) for what, score in zip(held, scored)]
        rollout.metas += gather_metas(metas, self.parallel, wrong_routes)
        rollout.held += [(prompt, response) for _, prompt, response in held]

    def _generate(self, prompts: list[Prompt], n: int, temperature: float, seed: int) -> list[list[Response]]:
        if self.client is None or not prompts:
            return []
        tokens = [prompt.tokens for prompt in prompts]
        stop = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return self.client.generate(tokens, n, temperature, self.config.rollout.max_new_tokens, stop, seed=seed)

    def _score(self, pairs: list[tuple[Prompt, Response]]) -> list[Score]:
        if self.scorer is None:
            return []
        samples = [
            self.texts.input(r.tokens, r.prompt_len, p.text, p.answer, p.row, r.finish_reason == "length")
            for p, r in pairs
        ]
        return self.scorer.score(samples, stop_at_first=self.config.train.on_bad_batch == "stop")

    def _meta(self, group: int, prompt: Prompt, response: Response, reward: float, fault: str, steps_done: int) -> Meta:
        unsound = np.flatnonzero(~np.isfinite(response.logprobs))
        if not fault and len(unsound):
            fault = f"the rollout's log-probability of its token {unsound[0]} is {response.logprobs[unsound[0]]}"
        return Meta(
            prompt=group,
            prompt_len=response.prompt_len,
            tokens=len(response.tokens),
            reward=reward,
            version=min((span["version"] for span in response.weight_versions), default=steps_done),
            owner=self.parallel.coord.rank,
            has_routes=response.routes is not None,
            truncated=response.finish_reason == "length",
            line=prompt.line,
            fault=fault,
        )

    def _accept_routes(self, held: list[tuple[int, Prompt, Response]]) -> str | None:
        """Reduces the responses' routes to MoE layers; what is wrong
        with the first bad ones, in one line that names the response.
        """
        if self.routes is None:
            return None
        weight_map, needed = (
            self.engine.model.weight_map,
            self.config.replay_mode == "R3" and self.config.replay.on_missing == "error",
        )
        size = weight_map.moe_layers, weight_map.num_layers, weight_map.num_experts, weight_map.top_k
        for number, (i, prompt, response) in enumerate(held):
            nth = sum(other == i for other, _, _ in held[:number])
            name = f"response {nth} to the prompt on line {prompt.line} ({prompt.text[-40:]!r})"
            try:
                if response.routes is not None:
                    response.routes = accept_routes(response.routes, len(response.tokens) - 1, *size)
                elif needed:
                    raise ValueError(
                        "none, which replay.mode R3 needs; check the worker, or set replay.on_missing=live"
                    )
            except ValueError as wrong:
                return f"routes of {name}: {wrong}; does the rollout worker serve the trainer's model?"
        return None

    def _bad(self, metas: list[Meta], step: int) -> int:
        """How many samples cannot be used. Under train.on_bad_batch stop every rank
        raises UserError, naming the first.
        """
        faults = [f"{self._name(metas, n)}: {meta.fault}" for n, meta in enumerate(metas) if meta.fault]
        if faults and self.config.train.on_bad_batch == "stop":
            raise UserError(
                f"step {step + 1}: {faults[0]}; mend it, or leave such steps out by train.on_bad_batch=skip"
            )
        if faults and self.parallel.is_main:
            print(f"step {step + 1}: no update, {len(faults)} samples are bad, the first: {faults[0]}", flush=True)
        return len(faults)

    def _name(self, metas: list[Meta], number: int) -> str:
        return (
            f"response {number % self.config.batch.group} to the prompt on line {metas[number].line} of "
            f"{self.config.data.prompts}"
        )

    def _groups(self, metas: list[Meta]) -> tuple[list[int], list[int]]:
        """(groups to train on, groups that teach nothing), in order."""
        rewards, prompts = self._rewards(metas)
        teaches = informative(rewards, prompts, self.config.objective)
        dull = sorted({meta.prompt for meta, useful in zip(metas, teaches.tolist()) if not useful})
        gone = set(dull if self.config.batch.equal_groups != "keep" else [])
        return sorted({meta.prompt for meta in metas} - gone), dull

    def _rewards(self, metas: list[Meta]) -> tuple[Tensor, Tensor]:
        """What advantages are made of, float64 [n], and the group of
        each response [n]. A long response's reward is penalised.
        """
        data = self.config.data
        lengths = torch.tensor([meta.tokens - meta.prompt_len for meta in metas])
        rewards = torch.tensor([meta.reward for meta in metas], dtype=torch.float64)
        if data.overlong_buffer:
            rewards += overlong_penalty(
                lengths, self.config.rollout.max_new_tokens, data.overlong_buffer, data.overlong_penalty
            )
        return rewards, torch.tensor([meta.prompt for meta in metas], dtype=torch.long)

    def _lay_out(
        self, metas: list[Meta], groups: list[int], responses: dict[int, Response]
    ) -> tuple[list[list[Pack]], int]:
        """One deterministic assignment response -> (mini-batch, replica,
        pack) for the pi_old pass and all updates; then the move.
        """
        layout, config = self.parallel.layout, self.config
        rewards, prompts = self._rewards(metas)
        kept = torch.isin(prompts, torch.tensor(groups, dtype=torch.long))
        advantage = torch.zeros(len(metas), dtype=torch.float64)
        advantage[kept] = advantages(rewards[kept], prompts[kept], config.objective)
        masked = [config.batch.mask_truncated and meta.truncated for meta in metas]
        lengths = torch.tensor([0 if gone else meta.tokens - meta.prompt_len for meta, gone in zip(metas, masked)])
        divisor = torch.ones(len(metas), dtype=torch.float64)
        assignment: list[list[list[int]]] = [[] for _ in range(layout.dp)]
        counts = []
        for members in minibatches(metas, groups, config.batch.minibatches):
            chosen = torch.tensor(members)
            divisor[chosen] = denominators(lengths[chosen], prompts[chosen], config.objective)
            rows = [metas[i].rows for i in members]
            packed = assign(
                rows, layout.dp, config.engine.micro_batch_tokens, multiple=layout.pp if layout.vpp > 1 else 1
            )
            counts.append(len(packed[0]))
            for replica, packs in enumerate(packed):
                assignment[replica] += [[members[i] for i in pack] for pack in packs]
        packs, received = exchange(assignment, metas, advantage, divisor, responses, self.parallel, self.routes)
        for pack in packs:
            for start, i in zip(pack.starts, pack.responses):
                if masked[i]:
                    pack.mask[start : start + metas[i].rows] = 0
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
            "response/empty": float((lengths == 0).sum()),
            "version/rollout_lag_max": float(steps_done - min(meta.version for meta in metas)),
        }

    def _route_metrics(self, metas: list[Meta], held: list[tuple[Prompt, Response]], received: int) -> Values:
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
            version=response.weight_versions[-1]["version"] if response.weight_versions else 0,
        )
