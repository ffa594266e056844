"""The policy on validation prompts: mean@k and pass@k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch.distributed as dist

from megarl.config import Config
from megarl.data import Prompt
from megarl.errors import UserError
from megarl.launch.stop import StopRequest
from megarl.loop.reduce import Values
from megarl.loop.sampler import Sampler
from megarl.loop.scoring import RewardScorer
from megarl.observe.metrics import read_metrics
from megarl.observe.output import Output
from megarl.observe.trace import phase
from megarl.reward.figures import evaluation_figures
from megarl.reward.pool import Score


class Evaluation:
    """When the policy is evaluated: every eval.every steps and at the end. Every rank calls every method.

    It follows the step's row and checkpoint, which so outlive whatever becomes of it; its numbers are added to the row.
    output: on rank 0. watched: around what asks the servers, Fleet.watched. stop: what may end the wait for responses;
    every rank then raises Stopped, and the run that goes on makes up for it.
    """

    def __init__(
        self,
        config: Config,
        sampler: Sampler,
        scorer: RewardScorer,
        prompts: Sequence[Prompt],
        output: Output | None,
        watched: Callable[[], AbstractContextManager[None]] = nullcontext,
        stop: StopRequest | None = None,
    ) -> None:
        self.config, self.prompts, self.output, self.watched = config, prompts, output, watched
        self.sampler, self.scorer, self.stop = sampler, scorer, stop

    def is_due(self, step: int, *, last: bool) -> bool:
        """After `step`. last: the run ends here."""
        every = self.config.eval.every
        return bool(self.prompts) and (last or bool(every and step % every == 0))

    def after(self, step: int, *, last: bool) -> None:
        """An evaluation, where one is due."""
        if self.is_due(step, last=last):
            stop = None if last else self.stop  # no start makes up for the last one: the run is complete
            with phase("evaluate"), self.watched():
                values = evaluate(self.sampler, self.scorer, self.prompts, self.config, stop)
            if self.output:
                self.output.evaluated(step, values)

    def catch_up(self, step: int) -> None:
        """That of `step`, which the run goes on from, where a run that was ended between checkpoint and evaluation owes
        it.
        """
        owed = [False]
        if dist.get_rank() == 0 and step:
            rows = read_metrics(self.config.run.dir)
            owed = [bool(rows) and rows[-1]["step"] == step and "eval/k" not in rows[-1]]
        dist.broadcast_object_list(owed, src=0, group=self.sampler.parallel.host_group)
        if owed[0]:
            self.after(step, last=False)


@dataclass(frozen=True)
class _Evaluated:
    """line: of the prompt, in eval.prompts."""

    line: int
    score: Score


def evaluate(
    sampler: Sampler, scorer: RewardScorer, prompts: Sequence[Prompt], config: Config, stop: StopRequest | None = None
) -> Values:
    """k = eval.samples responses a prompt; the same reward as in training, a temperature of its own. Collective.

    Under train.on_bad_batch stop every rank raises UserError for a reward that fails; under skip such responses are
    left out and counted, and without any other there is no mean. stop: as of Evaluation.
    """
    settings = config.eval
    rollouts = sampler.sample_for_evaluation(prompts, settings.samples, settings.temperature, stop)
    scored = [
        _Evaluated(rollout.prompt.line, score) for rollout, score in zip(rollouts, scorer.score(rollouts), strict=True)
    ]
    gathered: list[list[_Evaluated]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, scored, group=sampler.parallel.host_group)
    everyone = [response for rank in gathered for response in rank]
    bad = [response for response in everyone if response.score.fault]
    if bad and config.train.on_bad_batch == "stop":
        raise UserError(
            f"evaluation, a response to the prompt on line {bad[0].line} of {settings.prompts}: {bad[0].score.fault}; "
            "mend it, or leave such responses out by train.on_bad_batch=skip"
        )
    scores = [response.score for response in everyone]
    return {**evaluation_figures(scores, settings.samples, config.data.pass_threshold)}
