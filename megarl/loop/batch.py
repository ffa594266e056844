"""Scored rollouts into a batch: which groups teach, their advantages, packs balanced over replicas, and the move of
every tensor to the ranks that train it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megarl.config import Config
from megarl.engine.batch import Meta, Pack, assign
from megarl.engine.build import Engine, route_shape
from megarl.engine.exchange import LossInputs, exchange, gather_metas, minibatches
from megarl.engine.parallel import Parallel
from megarl.errors import UserError
from megarl.loop.reduce import Values, over_ranks
from megarl.loop.sampler import Rollout, Sampled
from megarl.objective import advantages, denominators, informative, overlong_penalty
from megarl.observe.samples import Sample
from megarl.reward.pool import Score
from megarl.weights.map.layout import Layout


@dataclass(frozen=True)
class Span:
    """Rows [first, last) of a response: their tokens were sampled with weights that were `lag` optimizer steps old.
    later: whether the response had older weights before.
    """

    lag: int
    first: int
    last: int
    later: bool


@dataclass
class Batch:
    """minibatches: this rank's packs of each optimizer step, none where there is nothing to learn or something is bad.

    names: how to name response i of the batch (Pack.responses) to a user. samples: some of this rank's, to read.
    sampled: the numbers of rank 0's samples, on every rank. spans: of each response. foreign: in words, how many
    responses are of weights that the servers should not have; "" where none is.
    """

    minibatches: list[list[Pack]]
    names: list[str]
    metrics: Values
    samples: list[Sample]
    sampled: list[int]
    spans: list[list[Span]]
    foreign: str = ""


@dataclass(frozen=True)
class Groups:
    """Numbers of groups, in order. trained: those that updates see. dull: those that teach nothing."""

    trained: list[int]
    dull: list[int]


class ScoredRollouts:
    """What has been sampled and scored for one step so far: `metas` of all responses, the same on every rank, and the
    `rollouts` that this rank fetched. steps_done: optimizer steps before this step's first. committed: the versions
    that syncs have given the servers; None where only steps_done can be.
    """

    def __init__(
        self, config: Config, parallel: Parallel, steps_done: int, committed: Collection[int] | None = None
    ) -> None:
        self.config, self.parallel, self.steps_done = config, parallel, steps_done
        oldest = steps_done - config.rollout.max_lag
        self._versions = {version for version in committed or {steps_done} if version >= oldest}
        self.metas: list[Meta] = []
        self.rollouts: list[Rollout] = []
        self.groups = 0  # sampled so far
        self.seconds = 0.0
        self._start = time.perf_counter()
        self._calls = 0

    def wanted(self) -> int:
        """How many groups to sample now: the batch at first; then, under batch.equal_groups refill, as many as teach
        nothing, batch.max_refills times; else 0.
        """
        batch = self.config.batch
        calls = 1 + (batch.max_refills if batch.equal_groups == "refill" else 0)
        if self._calls == calls or any(meta.fault for meta in self.metas):
            return 0
        return batch.prompts - len(teaching_groups(self.metas, self.config).trained)

    def add(self, sampled: Sampled, scores: list[Score]) -> None:
        """Tells every rank of what each has fetched. Collective. UserError where a rank has wrong routes, Stopped
        where a signal ended the wait of one.
        """
        metas = [self._meta(rollout, score) for rollout, score in zip(sampled.rollouts, scores, strict=True)]
        gathered = gather_metas(metas, self.parallel, sampled.stopped or sampled.wrong_routes)
        self.metas += gathered
        self.rollouts += sampled.rollouts
        self.groups += len({meta.group for meta in gathered})
        self._calls += 1
        self.seconds = time.perf_counter() - self._start

    def foreign(self) -> int:
        """How many responses have tokens of weights that no sync committed within rollout.max_lag."""
        return sum(any(version not in self._versions for version, _, _ in meta.spans) for meta in self.metas)

    def numbers(self) -> list[int]:
        """For each of `rollouts` its place in `metas`."""
        return [n for n, meta in enumerate(self.metas) if meta.owner == self.parallel.coord.rank]

    def _meta(self, rollout: Rollout, score: Score) -> Meta:
        response, fault = rollout.response, score.fault
        unsound = np.flatnonzero(~np.isfinite(response.logprobs))
        if not fault and len(unsound):
            fault = f"the rollout's log-probability of its token {unsound[0]} is {response.logprobs[unsound[0]]}"
        versions = {span["version"] for span in response.weight_versions}
        if not fault and versions - self._versions:
            fault = (
                f"sampled with weights of version {', '.join(map(str, sorted(versions)))}, not "
                f"{' or '.join(map(str, sorted(self._versions)))}, which syncs committed within rollout.max_lag: "
                "something else changes the server's weights"
            )
        return Meta(
            group=rollout.group,
            prompt_len=response.prompt_len,
            tokens=len(response.tokens),
            reward=score.value,
            version=min(versions, default=self.steps_done),  # none: without a token
            owner=self.parallel.coord.rank,
            has_routes=response.routes is not None,
            truncated=response.truncated,
            line=rollout.prompt.line,
            fault=fault,
            spans=tuple((span["version"], span["start"], span["end"]) for span in response.weight_versions),
        )


def build_batch(rollouts: ScoredRollouts, engine: Engine, step: int, *, to_learn: bool = True) -> Batch:
    """Lays the rollouts out for training and moves them. Collective. step: rollout steps done before this one.

    Groups that teach nothing stay or go (batch.equal_groups). reward/* and response/* are of everything that was
    sampled. to_learn: leave out a batch of which nothing can be learnt, or in which a sample is bad; else the bad
    samples alone are left out. UserError for a bad sample under train.on_bad_batch stop.
    """
    config, metas, parallel = rollouts.config, rollouts.metas, rollouts.parallel
    bad = _bad_samples(metas, config, step, parallel, "no update" if to_learn else "without them")
    groups = teaching_groups(metas, config)
    trained = [] if bad and to_learn else groups.trained
    if not bad and to_learn and (why := _nothing_to_learn(metas, groups, config)):
        trained = []
        if parallel.is_main:
            print(f"step {step + 1}: nothing to learn, {why}; no update", flush=True)
    moved = move(rollouts, trained, engine)
    without = 0 if bad else config.batch.minibatches - len(moved.minibatches)
    metrics = rollout_metrics(metas, rollouts.steps_done, config.data.pass_threshold) | {
        "time/rollout_s": rollouts.seconds,
        "batch/groups": float(len(trained)),
        "batch/equal_groups": float(len(groups.dull)),
        "batch/refilled_groups": float(rollouts.groups - config.batch.prompts),
        "batch/bad_samples": float(bad),
        "batch/nothing_to_learn": float(without),
    }
    if moved.route_bytes is not None:
        metrics |= _route_metrics(rollouts, moved.route_bytes)
    shown = list(zip(rollouts.numbers(), rollouts.rollouts, strict=True))[: config.run.rollout_samples]
    samples = [_sample(rollout, metas[n].reward, n) for n, rollout in shown]
    sampled = [n for n, meta in enumerate(metas) if meta.owner == 0][: config.run.rollout_samples]
    names = [response_name(metas, n, config) for n in range(len(metas))]
    spans = [_spans(m, rollouts.steps_done) for m in metas]
    count = rollouts.foreign()
    foreign = f"{count} responses are of weights that no sync committed within rollout.max_lag" if count else ""
    return Batch(moved.minibatches, names, metrics, samples, sampled, spans, foreign)


def _spans(meta: Meta, steps_done: int) -> list[Span]:
    before = meta.prompt_len - 1  # row i predicts token i + 1
    return [Span(steps_done - version, before + start, before + end, start > 0) for version, start, end in meta.spans]


def _nothing_to_learn(metas: Sequence[Meta], groups: Groups, config: Config) -> str:
    """Why no update can come of these responses; "" where one can."""
    sampled = len({meta.group for meta in metas})
    rewards_alone = not (config.objective.kl_coef or config.objective.entropy_coef)
    if len(groups.dull) == sampled and (rewards_alone or not groups.trained):
        return f"in each of {sampled} groups all rewards are equal"
    if not trained_lengths(metas, config)[torch.isin(group_ids(metas), torch.tensor(groups.trained))].any():
        cut = sum(meta.truncated for meta in metas)
        return f"no response has a token to train on, {cut} of {len(metas)} were truncated and batch.mask_truncated"
    return ""


@dataclass(frozen=True)
class Moved:
    """minibatches: this rank's packs of each. route_bytes: of the routes that came to it; None if none travel."""

    minibatches: list[list[Pack]]
    route_bytes: int | None


def move(rollouts: ScoredRollouts, groups: list[int], engine: Engine) -> Moved:
    """Lays `groups` out and sends every tensor to the ranks that train it. Collective."""
    config, parallel = rollouts.config, rollouts.parallel
    laid_out = lay_out(rollouts.metas, groups, config, parallel.layout)
    responses = {n: rollout.response for n, rollout in zip(rollouts.numbers(), rollouts.rollouts, strict=True)}
    routes = route_shape(engine.model) if config.wants_routes and engine.model.weight_map.moe_layers else None
    exchanged = exchange(laid_out.assignment, rollouts.metas, laid_out.loss_inputs, responses, parallel, routes)
    edges = np.cumsum([0, *laid_out.packs_of_minibatch])
    minibatches = [exchanged.packs[first:last] for first, last in zip(edges[:-1], edges[1:], strict=True)]
    return Moved(minibatches, exchanged.route_bytes if routes is not None else None)


def teaching_groups(metas: Sequence[Meta], config: Config) -> Groups:
    """Which groups teach, and which updates see."""
    teaches = informative(shaped_rewards(metas, config), group_ids(metas), config.objective)
    dull = sorted({meta.group for meta, useful in zip(metas, teaches.tolist(), strict=True) if not useful})
    dropped = set(dull if config.batch.equal_groups != "keep" else [])
    return Groups(sorted({meta.group for meta in metas} - dropped), dull)


def group_ids(metas: Sequence[Meta]) -> Tensor:
    """int64 [n]: the group of each response."""
    return torch.tensor([meta.group for meta in metas], dtype=torch.long)


def shaped_rewards(metas: Sequence[Meta], config: Config) -> Tensor:
    """What advantages are made of, float64 [n]. A long response's reward is penalised (data.overlong_buffer)."""
    data = config.data
    rewards = torch.tensor([meta.reward for meta in metas], dtype=torch.float64)
    if data.overlong_buffer:
        lengths = torch.tensor([meta.tokens - meta.prompt_len for meta in metas])
        rewards += overlong_penalty(lengths, config.rollout.max_new_tokens, data.overlong_buffer, data.overlong_penalty)
    return rewards


@dataclass(frozen=True)
class LaidOut:
    """assignment: packs[replica][pack] -> indices of responses. packs_of_minibatch: how many packs each replica has."""

    assignment: list[list[list[int]]]
    packs_of_minibatch: list[int]
    loss_inputs: LossInputs


def lay_out(metas: Sequence[Meta], groups: list[int], config: Config, layout: Layout) -> LaidOut:
    """One deterministic assignment response -> (mini-batch, replica, pack), for the pi_old pass and all updates. Bad
    samples have no place in it.
    """
    rewards, of_group = shaped_rewards(metas, config), group_ids(metas)
    sound = torch.tensor([not meta.fault for meta in metas], dtype=torch.bool)
    trained = torch.isin(of_group, torch.tensor(groups, dtype=torch.long)) & sound
    advantage = torch.zeros(len(metas), dtype=torch.float64)
    advantage[trained] = advantages(rewards[trained], of_group[trained], config.objective)
    masked = torch.tensor([_is_masked(meta, config) for meta in metas], dtype=torch.bool)
    lengths = trained_lengths(metas, config)
    denominator = torch.ones(len(metas), dtype=torch.float64)
    assignment: list[list[list[int]]] = [[] for _ in range(layout.dp)]
    counts = []
    for part in minibatches(metas, groups, config.batch.minibatches):
        members = [i for i in part if sound[i]]
        chosen = torch.tensor(members, dtype=torch.long)
        if not lengths[chosen].any():
            continue  # an update without a token: its loss would be 0/0, and Adam would move by its momentum
        denominator[chosen] = denominators(lengths[chosen], of_group[chosen], config.objective)
        rows = [metas[i].rows for i in members]
        packed = assign(rows, layout.dp, config.engine.micro_batch_tokens, layout.packs_multiple)
        counts.append(len(packed[0]))
        for replica, packs in enumerate(packed):
            assignment[replica] += [[members[i] for i in pack] for pack in packs]
    return LaidOut(assignment, counts, LossInputs(rewards, advantage, denominator, masked))


def trained_lengths(metas: Sequence[Meta], config: Config) -> Tensor:
    """int64 [n]: tokens of each response that stand in the loss."""
    return torch.tensor([0 if _is_masked(meta, config) else meta.tokens - meta.prompt_len for meta in metas])


def _is_masked(meta: Meta, config: Config) -> bool:
    return config.batch.mask_truncated and meta.truncated


def response_name(metas: Sequence[Meta], number: int, config: Config) -> str:
    """How to name response `number` of the batch to a user."""
    nth, line = number % config.batch.group, metas[number].line
    return f"response {nth} to the prompt on line {line} of {config.data.prompts}"


def rollout_metrics(metas: Sequence[Meta], steps_done: int, pass_threshold: float) -> Values:
    """reward/*, response/* and the lag, of everything that was sampled. A response without a reward (a bad sample) is
    left out of reward/*, which are missing where none has one.
    """
    rewarded = [meta for meta in metas if np.isfinite(meta.reward)]
    rewards = np.array([meta.reward for meta in rewarded])
    groups = np.array([meta.group for meta in rewarded])
    lengths = np.array([meta.tokens - meta.prompt_len for meta in metas])
    passed = [rewards[groups == group].max() >= pass_threshold for group in np.unique(groups)]
    of_rewards: Values = (
        {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "reward/pass_at_g": float(np.mean(passed)),
        }
        if rewarded
        else {}
    )
    return of_rewards | {
        "response/length_mean": float(lengths.mean()),
        "response/truncated_frac": float(np.mean([meta.truncated for meta in metas])),
        "response/tokens": float(lengths.sum()),
        "response/empty": float((lengths == 0).sum()),
        "version/rollout_lag_max": float(steps_done - min(meta.version for meta in metas)),
    }


def _bad_samples(metas: Sequence[Meta], config: Config, step: int, parallel: Parallel, outcome: str) -> int:
    """How many samples cannot be used. Under train.on_bad_batch stop every rank raises UserError, naming the first.

    outcome: what to say that the step does else.
    """
    faults = [f"{response_name(metas, n, config)}: {meta.fault}" for n, meta in enumerate(metas) if meta.fault]
    if faults and config.train.on_bad_batch == "stop":
        raise UserError(f"step {step + 1}: {faults[0]}; mend it, or leave such steps out by train.on_bad_batch=skip")
    if faults and parallel.is_main:
        print(f"step {step + 1}: {outcome}, {len(faults)} samples are bad, the first: {faults[0]}", flush=True)
    return len(faults)


def _route_metrics(rollouts: ScoredRollouts, received: int) -> Values:
    """received: bytes of routes that came to this rank. Collective."""
    fetched = sum(r.response.routes.nbytes for r in rollouts.rollouts if r.response.routes is not None)
    one = torch.tensor([fetched, received], dtype=torch.float64)
    ingested, most = over_ranks(rollouts.parallel, one[:1], one[1:])
    return {
        "routing/bytes_ingested": float(ingested),
        "routing/bytes_received_per_rank": float(most),
        "routing/missing_rows": float(sum(meta.rows for meta in rollouts.metas if not meta.has_routes)),
    }


def _sample(rollout: Rollout, reward: float, number: int) -> Sample:
    response, prompt = rollout.response, rollout.prompt
    return Sample(
        prompt=prompt.text,
        tokens=response.tokens[response.prompt_len :].tolist(),
        answer=prompt.answer,
        reward=reward,
        finish_reason=response.finish_reason,
        version=response.weight_versions[-1]["version"] if response.weight_versions else 0,
        rollout=response.logprobs.tolist(),
        number=number,
    )
