"""Supervised fine-tuning on demonstrations, by the same engine: the cold start of a run. Writes a Hugging Face folder."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.config import Config, dump_config, load_config
from megarl.data import PromptStream, load_demonstrations, load_tokenizer
from megarl.engine.batch import Pack, assign, make_packs
from megarl.engine.build import Engine, build_engine
from megarl.engine.export import export_hf
from megarl.engine.parallel import destroy_parallel
from megarl.objective import Sums
from megarl.report.metrics import MetricsLogger
from megarl.report.progress import Progress

Demonstration = tuple[list[int], int]  # tokens of prompt and response, length of the prompt


def main(argv: list[str]) -> int:
    config = load_config(argv[0], argv[1:])
    engine = build_engine(config, optimizer_steps=config.train.steps)
    parallel = engine.model.parallel
    tokenizer = load_tokenizer(config.model.path)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    data = load_demonstrations(config.sft.data, tokenizer, longest, config.data.on_bad_line)
    stream = PromptStream(len(data), config.run.seed, config.data.shuffle)
    run_dir = Path(config.run.dir)
    logger = progress = None
    if parallel.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_config(config))
        logger = MetricsLogger(run_dir, config.run.loggers, settings=config.model_dump(mode="json"))
        progress = Progress(config.train.steps)
    for step in range(1, config.train.steps + 1):
        start = time.perf_counter()
        batch = [data[i] for i in stream.next(config.sft.batch)]
        packs, targets = lay_out(batch, engine, config)
        results, norms = engine.update(packs, "off", partial(nll, targets))
        loss = total_loss(results, engine)
        if logger and progress:
            seconds = time.perf_counter() - start
            row = {"loss/value": loss, "time/step_s": seconds, "throughput/tokens_per_s": sum(len(t) for t, _ in batch) / seconds, **norms}
            logger.log(step, row)
            if step % 20 == 0 or step == config.train.steps:
                progress.update(step, row)
    out = Path(config.sft.out) if config.sft.out else run_dir / "hf"
    export_hf(engine.model, config.model.path, out)
    if logger:
        logger.close()
        print(f"wrote {out}")
    destroy_parallel()
    return 0


def lay_out(batch: list[Demonstration], engine: Engine, config: Config) -> tuple[list[Pack], int]:
    """This rank's packs of one batch, and the number of response tokens in the whole batch."""
    layout, coord = engine.model.parallel.layout, engine.model.parallel.coord
    multiple = layout.pp if layout.vpp > 1 else 1
    assigned = assign([len(tokens) - 1 for tokens, _ in batch], layout.dp, config.engine.micro_batch_tokens, multiple)[coord.dp]
    packs = make_packs(assigned, [torch.tensor(tokens) for tokens, _ in batch], [prompt_len for _, prompt_len in batch], layout, coord)
    return packs, sum(len(tokens) - prompt_len for tokens, prompt_len in batch)


def nll(targets: int, pack: Pack, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Sums]:
    """Mean negative log-likelihood over the response tokens of the whole batch: this pack's part of it."""
    loss = -(logprobs * pack.mask.to(logprobs.device)).sum() / targets
    return loss, {"loss": loss.detach().double()}


def total_loss(results: list[Sums], engine: Engine) -> float:
    """The batch's loss on every rank. Only the last stage has parts, and its tensor-parallel ranks have the same ones."""
    at = engine.model.parallel
    total = torch.zeros((), dtype=torch.float64, device=at.device.device)
    if at.is_last_stage and at.coord.tp == at.coord.cp == 0:
        total += sum(part["loss"] for part in results)
    dist.all_reduce(total)
    return float(total)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
