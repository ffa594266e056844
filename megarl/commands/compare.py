"""`megarl compare`: what the training engine says of the rollout
engine's responses, before any training: the mismatch report.

The prompts are answered by the rollout engine, batch.group times each, as the first step of a run
would; the training engine, in the configured layout, scores the responses teacher-forced at the same
temperature, with its routing live and with the rollout's replayed. The servers read model.path; under sync.quantize,
or from a checkpoint of a run, the trainer sends them the weights as a run does. Writes run.dir/compare.html,
compare.json, and compare.jsonl, the responses as `megarl generate` writes them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megarl.announce import announce, plural
from megarl.checkpoints import is_hf_folder
from megarl.commands.arguments import parse
from megarl.commands.jsonl import encode_npy
from megarl.commands.score import HAS_ROUTE, LIVE_ROUTES, ROUTES, SCORE_GAP, WholePack, gather_packs
from megarl.config import Config, load_config
from megarl.data import Prompt, load_tokenizer, prompts_of
from megarl.engine.build import Engine, build_engine
from megarl.engine.parallel import destroy_parallel
from megarl.engine.step import Routes
from megarl.errors import UserError
from megarl.folders import write_whole
from megarl.loop.batch import Batch, ScoredRollouts, build_batch
from megarl.loop.refit import Refit
from megarl.loop.sampler import Sampler
from megarl.loop.scoring import RewardScorer
from megarl.report.mismatch import Compared, Pass, figures, render, text_table, worst_tokens
from megarl.report.verdict import precision_of
from megarl.rollout.fleet import Fleet

MU = "rollout.logprobs"
FIELDS = ("tokens", "labels", "mask", MU, ROUTES, HAS_ROUTE, LIVE_ROUTES, SCORE_GAP)


def main(argv: list[str]) -> int:
    args = parse("compare", argv)
    config = load_config(args.config, args.overrides)
    announce(f"loading the weights of {config.model.path}")
    engine = build_engine(config, temperature=config.rollout.temperature)
    parallel = engine.model.parallel
    tokenizer = load_tokenizer(config.model)
    prompts = _prompts(config, tokenizer, args.input)
    if len(prompts) < parallel.layout.dp:
        raise UserError(
            f"{len(prompts)} prompts are fewer than the {parallel.layout.dp} data-parallel ranks; give more, or fewer "
            "ranks"
        )
    has_routes = bool(engine.model.weight_map.moe_layers)
    config = config.changed(
        replay={"mode": config.replay_mode if has_routes else "none"},  # unset, it would follow batch.minibatches
        batch={"prompts": len(prompts), "minibatches": 1, "equal_groups": "keep"},
    )
    fleet = Fleet(config, parallel.device.device, is_ingest=parallel.is_ingest, hosts=parallel.host_group)
    sampler = Sampler(config, engine, fleet.client if parallel.is_ingest else None, tokenizer)
    scorer = RewardScorer(config, tokenizer, fetches=parallel.is_ingest)
    try:
        if must_send(config):
            announce("sending the weights to the rollout servers")
            Refit(config, engine, fleet).sync(0)
        announce(f"sampling {plural(len(prompts) * config.batch.group, 'response')}")
        rollouts = ScoredRollouts(config, parallel, steps_done=0)
        with fleet.watched():
            sampled = sampler.sample(prompts, first_group=0, step=0)
            rollouts.add(sampled, scorer.score(sampled.rollouts))
        batch = build_batch(rollouts, engine, step=0, to_learn=False)
    finally:
        scorer.close()
        fleet.close()
    announce("scoring them")
    responses = compare(engine, batch, captured=sampler.wants_routes)
    if parallel.is_main:
        report = describe(config, engine, batch, responses)
        report["worst"] = worst_tokens(responses, lambda tokens: str(tokenizer.decode(tokens)))
        print(text_table(report))
        page = write(Path(config.run.dir), report, responses)
        print(f"\nthe worst tokens in their text, and the distributions: {page}")
    dist.barrier(group=parallel.host_group)
    destroy_parallel()
    return 0


def must_send(config: Config) -> bool:
    """Whether vLLM cannot read from model.path the weights that a run would sample from."""
    return config.sync.quantize != "none" or not is_hf_folder(config.model.path)


def _prompts(config: Config, tokenizer: Any, given: str | None) -> Sequence[Prompt]:
    """All prompts of the file `given`, or the first batch.prompts of data.prompts."""
    prompts, _ = prompts_of(config, given or config.data.prompts, tokenizer, needs_answer=False)
    return prompts if given else prompts[: config.batch.prompts]


def compare(engine: Engine, batch: Batch, captured: bool) -> list[Compared]:
    """Scores the batch, live and, where routes were captured, replayed. Responses without a token to compare are left
    out. In the order of the responses, on rank 0; empty elsewhere. UserError, on every rank, where none is
    left.
    """
    packs = [pack for minibatch in batch.minibatches for pack in minibatch]
    if not packs:
        raise UserError(
            "no response is left to compare: each is bad, empty or, under batch.mask_truncated, truncated; mend the "
            "reward, or set batch.mask_truncated=false"
        )
    passes: list[tuple[Routes, list[WholePack]]] = []
    for routes in ("record", "replay") if captured else ("off",):
        passes.append((routes, gather_packs(engine, packs, engine.logprobs(packs, routes), FIELDS)))
    live, replayed = passes[0][1], passes[1][1] if captured else [None] * len(passes[0][1])
    compared = {}
    for live_pack, replayed_pack in zip(live, replayed, strict=True):
        for i, span in live_pack.spans():
            if live_pack.values["mask"][span].any():
                compared[i] = _compared(live_pack, replayed_pack, span)
    return [compared[i] for i in sorted(compared)]


def _compared(live: WholePack, replayed: WholePack | None, span: slice) -> Compared:
    values = {name: value[span] for name, value in live.values.items()}
    predicts = values["mask"] > 0
    return Compared(
        tokens=[*values["tokens"].tolist(), int(values["labels"][-1])],
        prompt_len=int(predicts.argmax()) + 1,
        rollout=values[MU][predicts],
        routes=values[ROUTES] if ROUTES in values and values[HAS_ROUTE].all() else None,
        live=_pass(live, span, predicts),
        replayed=None if replayed is None else _pass(replayed, span, predicts),
    )


def _pass(pack: WholePack, span: slice, predicts: np.ndarray) -> Pass:
    names = {"logprobs": "logprobs", "top_k": LIVE_ROUTES, "gap": SCORE_GAP}
    return Pass(**{key: pack.values[name][span][predicts] for key, name in names.items() if name in pack.values})


def describe(config: Config, engine: Engine, batch: Batch, responses: list[Compared]) -> dict[str, Any]:
    """What compare.json holds, but for the worst tokens."""
    layout, cap = engine.model.parallel.layout, config.objective.is_cap
    sizes = [f"{name} {size}" for name, size in config.parallel.model_dump(exclude_none=True).items()]
    device = engine.model.parallel.device
    trained = str(device.dtype(config.engine.dtype)).removeprefix("torch.")
    rolled_out = config.rollout_dtype(on_gpu=device.device.type == "cuda")
    resolved = config.model_dump(mode="json")
    resolved["engine"]["dtype"], resolved["rollout"]["dtype"] = trained, rolled_out
    return {
        "model": config.model.path,
        "layout": ", ".join([*sizes, f"dp {layout.dp}"]),
        "engine_dtype": trained,
        "rollout_dtype": rolled_out,
        "precision": precision_of(resolved, []),
        "replay": config.replay_mode,
        "quantize": config.sync.quantize,
        "temperature": config.rollout.temperature,
        "is_cap": cap,
        "prompts": config.batch.prompts,
        "responses": len(responses),
        "tokens": sum(len(response.rollout) for response in responses),
        "batch": batch.metrics,
        "live": figures(responses, "live", cap),
        "replayed": figures(responses, "replayed", cap),
    }


def write(folder: Path, report: dict[str, Any], responses: list[Compared]) -> Path:
    """All files of the report, each whole or not there; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "tokens": response.tokens,
            "prompt_len": response.prompt_len,
            "logprobs": response.rollout.tolist(),
            "routes": None if response.routes is None else encode_npy(response.routes),
        }
        for response in responses
    ]
    texts = {
        "compare.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "compare.json": json.dumps(report, indent=1) + "\n",
        "compare.html": render(report, responses, folder),
    }
    for name, text in texts.items():
        write_whole(folder / name, text)
    return folder / "compare.html"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
