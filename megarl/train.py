"""The loop: roll out, recompute, update, sync. `torchrun ... -m
megarl.train CONFIG [key=value ...]`; every rank runs the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megarl.announce import announce
from megarl.checkpoints import whole_checkpoints
from megarl.config import Config, dump_config, load_config
from megarl.data import Prompt, PromptStream, load_tokenizer, prompts_of
from megarl.engine.build import build_engine
from megarl.engine.checkpoint import load_checkpoint, save_checkpoint
from megarl.engine.parallel import destroy_parallel
from megarl.loop.collect import Collector, Values
from megarl.loop.colocate import Turns
from megarl.loop.learn import Learner
from megarl.loop.refit import Refit
from megarl.observe.metrics import MetricsLogger
from megarl.observe.progress import Progress
from megarl.observe.samples import Sample, write_samples
from megarl.observe.trace import phase, start_trace, stop_trace
from megarl.observe.worst import Row, write_worst
from megarl.rollout.fleet import Fleet


def main(argv: list[str]) -> int:
    train(load_config(argv[0], argv[1:]))
    destroy_parallel()
    return 0


def train(config: Config, connect: Callable[..., Fleet] = Fleet) -> None:
    """One run, from its beginning or its last whole checkpoint. `connect`: how the rollout workers are found."""
    announce(f"loading the weights of {config.model.path}")
    engine = build_engine(
        config, optimizer_steps=config.train.steps * config.batch.minibatches, temperature=config.rollout.temperature
    )
    parallel = engine.model.parallel
    tokenizer = load_tokenizer(config.model.path)
    prompts, validation = load_data(config, tokenizer)
    stream = PromptStream(len(prompts), config.run.seed, config.data.shuffle)
    folder = Path(config.run.dir) / "checkpoints"
    learner = Learner(config, engine)
    step = done = 0  # rollout steps, optimizer steps
    if whole := whole_checkpoints(folder):
        state = load_checkpoint(engine, whole[-1], learner.critic)
        step, done = state["step"], state["optimizer_steps"]
        stream.load_state_dict(state["stream"])

    turns = Turns(config, [engine, *([learner.critic] if learner.critic else [])])
    output = Output(config, step, tokenizer) if parallel.is_main else None
    fleet = connect(config, parallel.device.device, is_ingest=parallel.is_ingest)
    collector = Collector(config, engine, fleet.client if parallel.is_ingest else None, tokenizer)
    refit = Refit(config, engine, fleet)
    try:
        announce("sending the weights to the rollout servers for the first time")
        refit.sync(done)
        while step < config.train.steps:
            start = time.perf_counter()
            fleet.check()
            with fleet.watched():
                batch = collector.collect(lambda k: [prompts[i] for i in stream.next(k)], step, done)
            with turns.training(fleet):
                learned, updates = learner.learn(batch, step)
            step, done = step + 1, done + updates
            metrics: Values = {**batch.metrics, **learned}
            metrics |= refit.sync(done)
            metrics |= rates(metrics, time.perf_counter() - start)
            last = step == config.train.steps
            if validation and (last or (config.eval.every and step % config.eval.every == 0)):
                with phase("evaluate"), fleet.watched():
                    metrics |= collector.evaluate(validation, config.eval.samples, config.eval.temperature)
            if output:
                output.write(step, metrics, batch.samples, learner.worst)
            if last or (config.run.save_every and step % config.run.save_every == 0):
                state = {"optimizer_steps": done, "stream": stream.state_dict()}
                with phase("checkpoint"), turns.training(fleet):
                    save_checkpoint(engine, folder, step, state, config.run.keep, learner.critic)
    finally:
        collector.close()
        fleet.close()
    if output:
        output.close()


def rates(metrics: Values, seconds: float) -> Values:
    """time/step_s and tokens a second: of the whole step, and of its updates alone, where it had one."""
    tokens, update = metrics["response/tokens"], metrics["time/update_s"]
    assert isinstance(tokens, float) and isinstance(update, float)
    values: Values = {"time/step_s": seconds, "throughput/tokens_per_s": tokens / seconds}
    if "optim/grad_norm" in metrics:  # without an update, update_s is the time of doing nothing
        values["throughput/train_tokens_per_s"] = tokens / update
    return values


def load_data(config: Config, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """Training and validation prompts; the latter empty where evaluation is off."""

    def say(line: str) -> None:
        if dist.get_rank() == 0:
            print(line, flush=True)

    def load(path: str) -> list[Prompt]:
        prompts, bad = prompts_of(config, path, tokenizer, say=say)
        if bad:
            say(f"{path}: skipped {bad} bad lines, kept {len(prompts)}")
        return prompts

    return load(config.data.prompts), load(config.eval.prompts)[
        : config.eval.max_prompts
    ] if config.eval.prompts else []


class Output:
    """What people see, on rank 0: metrics.jsonl, loggers, rollouts/, config.yaml and the live line."""

    def __init__(self, config: Config, resumed: int, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.dir = Path(config.run.dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "config.yaml").write_text(dump_config(config), "utf-8")
        self.logger = MetricsLogger(self.dir, config.run.loggers, resumed, config.model_dump(mode="json"))
        start_trace(self.dir)
        self.progress = Progress(config.train.steps)
        if resumed:
            print(f"resuming after step {resumed}")

    def write(self, step: int, metrics: Values, samples: list[Sample], worst: list[Row]) -> None:
        self.logger.log(step, metrics)
        self.progress.update(step, metrics)
        if samples:
            write_samples(self.dir, step, samples)
        if worst:
            write_worst(self.dir, step, worst, self.tokenizer.decode)

    def close(self) -> None:
        self.logger.close()
        self.progress.close()
        stop_trace()


if __name__ == "__main__":  # under torchrun: `megarl train`, with its refusals and its one-line errors
    from megarl import cli

    sys.exit(cli.main(["train", *sys.argv[1:]]))
