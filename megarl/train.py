"""The loop: roll out, recompute, update, sync. On every rank: torchrun ... -m megarl.train CONFIG [key=value ...]"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from megarl.announce import announce
from megarl.config import Config, load_config
from megarl.data import PromptStream, load_tokenizer
from megarl.data.stream import content_digest
from megarl.engine.build import build_engine, join_ranks
from megarl.engine.parallel import destroy_parallel
from megarl.errors import Stopped, UserError
from megarl.launch.processes import log_dir_of
from megarl.launch.starts import is_over
from megarl.loop.batch import ScoredRollouts, build_batch
from megarl.loop.colocate import MemoryTurns
from megarl.loop.dull import DullSteps
from megarl.loop.evaluate import Evaluation
from megarl.loop.learn import Learner
from megarl.loop.prompts import load_run_prompts
from megarl.loop.reduce import Values, rates
from megarl.loop.refit import Refit
from megarl.loop.resume import resume
from megarl.loop.sampler import Sampler
from megarl.loop.saving import Saver
from megarl.loop.scoring import RewardScorer
from megarl.loop.source import Progress, open_source
from megarl.observe.output import Output
from megarl.observe.stall import StallWatch
from megarl.observe.trace import enter
from megarl.report.live import LivePage
from megarl.rollout.fleet import Fleet
from megarl.rollout.patience import reading_s


def main(argv: list[str]) -> int:
    train(load_config(argv[0], argv[1:]))
    destroy_parallel()
    return 0


def train(config: Config, connect: Callable[..., Fleet] = Fleet) -> None:
    """One run, from its beginning or its last whole checkpoint. `connect`: how the rollout workers are found."""
    announce(f"loading the weights of {config.model.path}")
    parallel = join_ranks(config)
    stall = StallWatch(log_dir_of("train", config), parallel.coord.rank, parallel.layout.world, config.launch.stall_s)
    enter("the load of the weights", reading_s(Path(config.model.path)))
    temperature = config.rollout.temperature
    engine = build_engine(config, parallel, optimizer_steps=config.optimizer_steps, temperature=temperature)
    tokenizer = load_tokenizer(config.model)
    prompts = load_run_prompts(config, tokenizer, asks=parallel.is_ingest)
    stream = PromptStream(len(prompts.train), config.run.seed, config.data.shuffle, content_digest(config.data.prompts))
    learner = Learner(config, engine)
    dull, why = DullSteps(config), ""  # why the run ends early; empty: it goes on
    step = done = 0  # rollout steps, optimizer steps
    if state := resume(Path(config.run.dir), engine, learner.critic):
        step, done = state["step"], state["optimizer_steps"]
        stream.load_state_dict(state["stream"], force=config.run.resume == "force")
        if "guard" in state:  # not in checkpoints of before
            learner.guard.load_state_dict(state["guard"])

    turns = MemoryTurns(config, [engine, *([learner.critic] if learner.critic else [])])
    output = Output(config, step, tokenizer, LivePage(Path(config.run.dir))) if parallel.is_main else None
    enter("the wait for rollout workers", 2 * config.rollout.start_timeout_s)  # for the store's host, then for them
    fleet = connect(config, parallel.device.device, is_ingest=parallel.is_ingest, hosts=parallel.host_group)
    sampler = Sampler(config, engine, fleet.client if parallel.is_ingest else None, tokenizer)
    source = open_source(config, sampler, prompts.train, stream)
    scorer = RewardScorer(config, tokenizer, fetches=parallel.is_ingest)
    refit = Refit(config, engine, fleet)
    saver = Saver(config, engine, learner.critic)
    evaluation = Evaluation(config, sampler, scorer, prompts.validation, output, fleet.watched, saver.stop)
    enter("the first step")
    sampler.recover = lambda: refit.ready(done, saver.stop)
    try:
        announce("sending the weights to the rollout servers for the first time")
        refit.sync(done)
        evaluation.catch_up(step)
        while step < config.train.steps and not (why or saver.ending):
            start = time.perf_counter()
            refit.ready(done, saver.stop, ask_all=False)
            rollouts = ScoredRollouts(config, parallel, done, refit.committed)
            with fleet.watched():
                while wanted := rollouts.wanted():
                    sampled = source.next(wanted, rollouts.groups, Progress(step, done), saver.stop)
                    rollouts.add(sampled, scorer.score(sampled.rollouts))
            if rollouts.foreign():
                refit.check()  # a server that holds other weights ends the run here
            batch = build_batch(rollouts, engine, step)
            with turns.training(fleet):
                learned = learner.learn(batch, step, refit.settle)
            refit.settle()  # where nothing was learned
            if learned.guarded and not batch.foreign:
                refit.check()
            step, done = step + 1, done + learned.optimizer_steps
            metrics: Values = {**batch.metrics, **learned.metrics, **refit.sync(done), **fleet.figures()}
            seconds = time.perf_counter() - start
            metrics |= rates(metrics, seconds) | source.metrics(seconds)
            why = dull.add(step, metrics) or learner.guard.gives_up(step)
            last = bool(why) or step == config.train.steps
            state = {"optimizer_steps": done, "stream": source.state_dict(), "guard": learner.guard.state_dict()}
            due = saver.due(step, state, last=last)
            if output:
                output.write(step, metrics, batch.samples, learned.notes)
            if due:
                with turns.training(fleet):
                    saver.save()
            if not saver.ending:
                if evaluation.is_due(step, last=last):
                    refit.settle()
                evaluation.after(step, last=last)
        saver.finish()
        if not saver.ending:
            refit.settle()
    except Stopped as stopped:  # Ctrl-C or SIGTERM, while responses were awaited
        with turns.training(fleet):
            saver.interrupted(stopped)
    finally:
        scorer.close()
        # who starts the trainers again finds the workers as they are
        fleet.close(run_is_over=is_over(sys.exception(), gave_up=bool(why)))
        saver.close()
        stall.close()
    if output:
        output.close()
    if why:
        raise UserError(why)
    saver.end()


if __name__ == "__main__":  # under torchrun: `megarl train`, with its refusals and its one-line errors
    from megarl import cli

    sys.exit(cli.main(["train", *sys.argv[1:]]))
