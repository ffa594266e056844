"""Where a step's rollouts come from: sampled now, for it alone (lock-step), or while the steps before it were trained
(rollout.max_lag).

Overlapped: groups are requests of their own, a bounded number of which is in flight on all servers. The first that are
finished make the next batch, unless one that is not would be too old for any later batch: that one is waited for. So
the bound on lag holds without dropping long responses, which would favour short ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist

from megarl.announce import announce, plural
from megarl.config import Config
from megarl.data import Picked, Prompt, PromptStream
from megarl.errors import Stopped
from megarl.launch.stop import StopRequest
from megarl.loop.reduce import Values
from megarl.loop.sampler import Rollout, Sampled, Sampler
from megarl.observe.trace import enter, phase
from megarl.rollout.client import sampling_of
from megarl.rollout.dispatch import Answered, Request, take
from megarl.rollout.patience import longest_wait_s
from megarl.rollout.registry import NoServers
from megarl.rollout.response import Response

RECOVERIES = 10  # in one batch
POLL_S = 0.05  # how long a rank waits for its own groups before all ranks tell each other what they have


@dataclass(frozen=True)
class Progress:
    """Of the run before this step: rollout steps and optimizer steps done."""

    steps: int
    optimizer_steps: int


class LockStep:
    """Every step's prompts are drawn, and sampled, when the step asks for them. Every rank calls every method."""

    def __init__(self, sampler: Sampler, prompts: Sequence[Prompt], stream: PromptStream) -> None:
        self.sampler, self.prompts, self.stream = sampler, prompts, stream

    def next(self, wanted: int, first_group: int, done: Progress, stop: StopRequest | None = None) -> Sampled:
        """`wanted` groups, numbered from first_group. stop: what may end the wait."""
        drawn = Picked(self.prompts, self.stream.next(wanted))
        return self.sampler.sample(drawn, first_group, done.steps, stop)

    def metrics(self, step_s: float) -> Values:
        """Of the step that took step_s seconds."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Of the stream, for a resumed run: no prompt is lost, none is learnt from twice."""
        return self.stream.state_dict()


@dataclass
class _Group:
    """A prompt that was drawn. number: how many were drawn before it. owner: the replica that fetches it.

    version: of its oldest token; before it is finished, of the weights when it was drawn, which are no newer.
    """

    number: int
    index: int
    owner: int
    version: int
    finished: bool = False
    spans: float = 1.0  # of weight versions, mean over its responses


@dataclass(frozen=True)
class _Finished:
    """What a rank tells the others of a group that it has fetched."""

    number: int
    version: int
    spans: float


@dataclass(frozen=True)
class _Told:
    """What a rank tells the others, or what any has told: groups it has fetched, whether a signal ends its wait,
    whether it found no server.
    """

    finished: list[_Finished]
    stopped: bool
    unserved: bool


class Overlapped:
    """Groups in flight and finished, the same list on every rank; their responses where they were fetched."""

    def __init__(self, config: Config, sampler: Sampler, prompts: Sequence[Prompt], stream: PromptStream) -> None:
        self.config, self.sampler, self.prompts, self.stream = config, sampler, prompts, stream
        self.batches_ahead = config.rollout.max_lag // config.batch.minibatches
        self._groups: dict[int, _Group] = {}
        self._drawn = stream.epoch * stream.n + stream.position  # seeds go on after a resume
        self._done: SimpleQueue[Answered] = SimpleQueue()
        self._asked: dict[Request, int] = {}  # -> the number of its group
        self._responses: dict[int, list[Rollout]] = {}  # of finished groups, by number
        self._unserved: list[Request] = []  # no server was left for them
        self._wrong_routes: str | None = None
        self._wait_s = longest_wait_s(config.rollout.request_timeout_s)
        self._dropped, self._waited_s, self._busy = 0, 0.0, dict[str, float]()
        self._lags: list[int] = []
        self._spans: list[float] = []

    def next(self, wanted: int, first_group: int, done: Progress, stop: StopRequest | None = None) -> Sampled:
        """As LockStep.next: the groups that a batch of now takes."""
        start = came = time.perf_counter()
        recovered = 0
        with phase("rollout"):
            while True:
                self._draw(wanted, done.optimizer_steps)
                try:
                    finished = self._take(stop)
                except Stopped as stopped:
                    self._tell([], stopped)
                    return Sampled([], stopped=stopped)
                told = self._tell(finished, None)
                if told.stopped:
                    return Sampled([])
                try:
                    if told.unserved:
                        recovered += 1
                        self._recover(recovered)
                except Stopped as stopped:  # on every rank
                    return Sampled([], stopped=stopped)
                now = time.perf_counter()
                came = now if finished else came
                if now - came < self._wait_s:  # no stall: all ranks go on, and what they wait for may still come
                    enter("rollout")
                self._drop(done.optimizer_steps)
                chosen = choose([*self._groups.values()], wanted, self._later(done.optimizer_steps), self.config)
                if chosen is not None:
                    break
        self._waited_s += time.perf_counter() - start
        return self._sampled(chosen, first_group, done.optimizer_steps)

    def metrics(self, step_s: float) -> Values:
        """async/* of the step that took step_s seconds, and of the servers since the last call. Collective."""
        client = self.sampler.client
        busy = client.dispatcher.busy_seconds() if client else {}
        everyone: list[dict[str, float]] = [{}] * dist.get_world_size()
        more = {url: self._more(url, busy[url]) for url in busy}
        dist.all_gather_object(everyone, more, group=self.sampler.parallel.host_group)
        self._busy = busy
        servers = {url for busy_of_rank in everyone for url in busy_of_rank}
        share = sum(min(max(busy_of_rank.get(url, 0.0) for busy_of_rank in everyone) / step_s, 1.0) for url in servers)
        values: Values = {
            "async/in_flight": float(sum(not group.finished for group in self._groups.values())),
            "async/dropped_groups": float(self._dropped),
            "async/trainer_idle_frac": min(self._waited_s / step_s, 1.0),
            "async/rollout_idle_frac": 1 - share / max(len(servers), 1),
        }
        if self._lags:
            values |= {
                "async/lag_mean": sum(self._lags) / len(self._lags),
                "async/lag_max": float(max(self._lags)),
                "async/spans_per_response": sum(self._spans) / len(self._spans),
            }
        self._dropped, self._waited_s, self._lags, self._spans = 0, 0.0, [], []
        return values

    def _more(self, url: str, busy_s: float) -> float:
        """Since the last metrics(); a server that left and came back counts from 0."""
        before = self._busy.get(url, 0.0)
        return busy_s - before if busy_s >= before else busy_s

    def state_dict(self) -> dict[str, Any]:
        """As LockStep.state_dict. Whatever is in flight or finished and was not trained is sampled again."""
        return self.stream.state_dict([group.index for group in self._groups.values()])

    def _draw(self, wanted: int, done: int) -> None:
        """New groups: enough for this batch and, in flight, for the next. Where groups are not finished by then, the
        servers are what the trainer waits for, and get more: as much as may be trained in time, batches_ahead in all.
        More than that would only age.
        """
        batch, dp = self.config.batch, self.sampler.parallel.layout.dp
        unfinished = sum(not group.finished for group in self._groups.values())
        ahead = min(batch.prompts * self.batches_ahead, batch.prompts + unfinished)
        for index in self.stream.next(max(max(wanted, batch.prompts) + ahead - len(self._groups), 0)):
            load = [0] * dp
            for group in self._groups.values():
                load[group.owner] += not group.finished
            group = _Group(self._drawn, index, load.index(min(load)), done)
            self._groups[group.number] = group
            self._drawn += 1
            if self.sampler.client is not None and group.owner == self.sampler.parallel.coord.dp:
                request = self._request(group)
                self._asked[request] = group.number
                self.sampler.client.dispatcher.submit(request)

    def _request(self, group: _Group) -> Request:
        config, n = self.config, self.config.batch.group
        rollout = config.rollout
        seed = config.run.seed * 1_000_003 * 1_000_003 % 2**31 + group.number * n
        sampling = sampling_of(n, rollout.temperature, rollout.max_new_tokens, self.sampler.stop_token_ids)
        return Request([self.prompts[group.index].tokens], n, sampling, [seed], self._done)

    def _take(self, stop: StopRequest | None) -> list[_Finished]:
        """What has come to this rank, after a short wait for it."""
        if self.sampler.client is None:
            return []
        with stop.interruptible() if stop else nullcontext():
            answers = take(self._done, POLL_S)
        finished = []
        for answered in answers:
            if isinstance(answered.error, NoServers):
                self._unserved.append(answered.request)
                continue
            number = self._asked.pop(answered.request)
            if answered.error:
                raise answered.error
            prompt, (responses,) = self.prompts[self._groups[number].index], answered.groups
            rollouts = [Rollout(number, prompt, response) for response in responses]
            self._wrong_routes = self._wrong_routes or self.sampler.check_routes(rollouts)
            self._responses[number] = rollouts
            finished.append(_finished(self._groups[number], responses))
        return finished

    def _tell(self, finished: list[_Finished], stopped: Stopped | None) -> _Told:
        """What every rank has fetched, to all. Collective."""
        everyone = [_Told([], False, False)] * dist.get_world_size()
        mine = _Told(finished, stopped is not None, bool(self._unserved))
        dist.all_gather_object(everyone, mine, group=self.sampler.parallel.host_group)
        for fetched in (fetched for told in everyone for fetched in told.finished):
            group = self._groups[fetched.number]
            group.finished, group.version, group.spans = True, fetched.version, fetched.spans
        return _Told([], any(told.stopped for told in everyone), any(told.unserved for told in everyone))

    def _recover(self, time_of_batch: int) -> None:
        """Where a rank found no server: waits for one, and asks again for what nobody has answered. Collective."""
        if self.sampler.recover is None:
            raise NoServers("no rollout server is left")
        if time_of_batch > RECOVERIES:
            raise NoServers(
                f"{RECOVERIES} times in one batch a trainer rank found no rollout server, though rank 0 did: can every "
                "host of trainers reach every server?"
            )
        time.sleep(min(time_of_batch - 1, 5))
        self.sampler.recover()
        again, self._unserved = self._unserved, []
        for request in again:
            assert self.sampler.client is not None
            self.sampler.client.dispatcher.submit(request)

    def _later(self, done: int) -> dict[int, int]:
        """Group -> how many batches after this one may still take it; below 0 where even this one may not."""
        lag, minibatches = self.config.rollout.max_lag, self.config.batch.minibatches
        return {n: (group.version + lag - done) // minibatches for n, group in self._groups.items()}

    def _drop(self, done: int) -> None:
        """Those that are too old, whose prompts go back. Those that batches wait for never become so by waiting."""
        old = [n for n, later in self._later(done).items() if later < 0 and self._groups[n].finished]
        self._dropped += len(old)
        self.stream.give_back([self._groups.pop(n).index for n in old])
        for n in old:
            self._responses.pop(n, None)

    def _sampled(self, chosen: list[int], first_group: int, done: int) -> Sampled:
        rollouts = []
        for place, number in enumerate(chosen):
            group = self._groups.pop(number)
            self._lags.append(done - group.version)
            self._spans.append(group.spans)
            fetched = self._responses.pop(number, [])
            rollouts += [Rollout(first_group + place, rollout.prompt, rollout.response) for rollout in fetched]
        return Sampled(rollouts, self._wrong_routes)


Source = LockStep | Overlapped


def open_source(config: Config, sampler: Sampler, prompts: Sequence[Prompt], stream: PromptStream) -> Source:
    """As rollout.max_lag says. Says what a resumed stream samples again."""
    if stream.returned and sampler.parallel.is_main:
        announce(f"{plural(len(stream.returned), 'prompt')} drawn and not trained before: sampled again")
    if config.rollout.max_lag:
        return Overlapped(config, sampler, prompts, stream)
    return LockStep(sampler, prompts, stream)


def choose(groups: Sequence[_Group], wanted: int, later: dict[int, int], config: Config) -> list[int] | None:
    """The numbers of `wanted` finished groups for this batch, in the order in which they were drawn; None: wait.

    Those that may wait least come first. Waits too where a batch without an unfinished group would leave more than the
    later batches can take in time: of those left, at most s batches' worth may have no more than s batches to wait.
    """
    finished = sorted((later[group.number], group.number) for group in groups if group.finished)
    if len(finished) < wanted:
        return None
    chosen = {number for _, number in finished[:wanted]}
    left = [(later[group.number], group.finished) for group in groups if group.number not in chosen]
    for batches in sorted({wait for wait, _ in left}):
        pressing = [done for wait, done in left if wait <= batches]
        if len(pressing) > config.batch.prompts * max(batches, 0) and not all(pressing):
            return None
    return sorted(chosen)


def _finished(group: _Group, responses: list[Response]) -> _Finished:
    spans = [response.weight_versions for response in responses]
    versions = [span["version"] for response in spans for span in response]
    return _Finished(group.number, min(versions, default=group.version), sum(map(len, spans)) / max(len(spans), 1))
