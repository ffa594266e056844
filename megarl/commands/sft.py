"""Supervised fine-tuning on demonstrations, by the same engine: the cold start of a run.
Writes a Hugging Face folder.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.announce import announce
from megarl.config import Config, dump_config, load_config
from megarl.data import PromptStream, demonstrations_of, load_tokenizer
from megarl.data.loader import StepPlan, batches, planner
from megarl.data.shards import Shards, write_shards
from megarl.engine.batch import Pack, assign, make_packs
from megarl.engine.build import Engine, build_engine
from megarl.engine.export import export_hf
from megarl.engine.parallel import destroy_parallel
from megarl.folders import write_whole
from megarl.objective import Sums
from megarl.observe.metrics import MetricsLogger
from megarl.observe.progress import Progress

MEET_S = 10.0


def main(argv: list[str]) -> int:
    config = load_config(argv[0], argv[1:])
    announce(f"loading the weights of {config.model.path}")
    engine = build_engine(config, optimizer_steps=config.train.steps)
    parallel = engine.model.parallel
    run_dir = Path(config.run.dir)
    announce(f"tokenising {config.sft.data}")
    shards = tokenise(config, run_dir / "shards", parallel.device.device, main=parallel.is_main)
    stream = PromptStream(len(shards), config.run.seed, config.data.shuffle)
    plans = planner(
        stream.next, config.sft.batch, config.train.steps, shards, lambda rows: local_packs(rows, engine, config)
    )
    multiple = parallel.layout.packs_multiple
    most_packs = -(-config.sft.batch // multiple) * multiple  # each demonstration in one of its own
    loaded = batches(config.data.loader, plans, shards, parallel.device.device, most_packs)
    logger = progress = None
    if parallel.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(run_dir / "config.yaml", dump_config(config))
        logger = MetricsLogger(run_dir, config.run.loggers, settings=config.model_dump(mode="json"))
        progress = Progress(config.train.steps, every_s=10)
    start = time.perf_counter()
    for step, (plan, tokens) in enumerate(loaded, 1):
        results, norms = engine.update(lay_out(plan, tokens, shards, engine), "off", partial(nll, plan.targets))
        loss = total_loss(results, engine)
        if logger and progress:
            seconds, start = time.perf_counter() - start, time.perf_counter()
            row = {
                "loss/value": loss,
                "time/step_s": seconds,
                "throughput/tokens_per_s": plan.tokens / seconds,
                **norms,
            }
            logger.log(step, row)
            progress.update(step, row)
    if progress:
        progress.close()
    out = Path(config.sft.out) if config.sft.out else run_dir / "hf"
    announce(f"writing {out}")
    export_hf(engine.model, config.model.path, out)
    if logger:
        logger.close()
        print(f"wrote {out}")
    destroy_parallel()
    return 0


def tokenise(config: Config, folder: Path, device: torch.device, *, main: bool) -> Shards:
    """The demonstrations as shards, written by rank 0. Collective."""

    def write() -> None:
        write_shards(demonstrations_of(config, load_tokenizer(config.model), say=print), folder)

    with ThreadPoolExecutor(1, "tokenise") as pool:
        writing = pool.submit(write) if main else None
        done = torch.zeros((), device=device)
        while not done:  # the ranks meet often: rank 0 may need longer than a group waits
            if writing is not None:
                wait([writing], MEET_S)
                if writing.done():
                    writing.result()  # an error is told before any other rank goes on
                    done.fill_(1)
            dist.all_reduce(done)
    return Shards(folder)


def local_packs(rows: list[int], engine: Engine, config: Config) -> list[list[int]]:
    """This rank's packs of one step, given the rows of its demonstrations."""
    layout, coord = engine.model.parallel.layout, engine.model.parallel.coord
    return assign(rows, layout.dp, config.engine.micro_batch_tokens, layout.packs_multiple)[coord.dp]


def lay_out(plan: StepPlan, tokens: list[list[Tensor]], shards: Shards, engine: Engine) -> list[Pack]:
    """Packs of the demonstrations that the loader read."""
    parallel = engine.model.parallel
    places, flat = iter(range(sum(map(len, plan.packs)))), [t for pack in tokens for t in pack]
    prompt_lens = [shards.prompt_len(i) for pack in plan.packs for i in pack]
    return make_packs(
        [[next(places) for _ in pack] for pack in plan.packs], flat, prompt_lens, parallel.layout, parallel.coord
    )


def nll(targets: int, pack: Pack, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Sums]:
    """Mean negative log-likelihood over the response tokens of the whole batch: this pack's part of it."""
    loss = -(logprobs * pack.mask.to(logprobs.device)).sum() / targets
    return loss, {"loss": loss.detach().double()}


def total_loss(results: list[Sums], engine: Engine) -> float:
    """The batch's loss on every rank. Only the last stage has parts, and its
    tensor-parallel ranks have the same ones.
    """
    parallel = engine.model.parallel
    total = torch.zeros((), dtype=torch.float64, device=parallel.device.device)
    if parallel.is_last_stage and parallel.coord.tp == parallel.coord.cp == 0:
        total += sum(part["loss"] for part in results)
    dist.all_reduce(total)
    return float(total)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
