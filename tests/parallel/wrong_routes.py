"""Runs inside torchrun ranks: `wrong_routes.py MODEL [CASE]`. One
rank's responses bring wrong routes; every rank must say so.

Without CASE all cases are caught one after the other, on the same ranks, and good routes are trained on in the end.
With it the error ends the process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megarl.config import load_config
from megarl.data import KeptPrompts, Prompt, load_tokenizer
from megarl.engine.build import build_engine
from megarl.engine.parallel import destroy_parallel
from megarl.errors import UserError
from megarl.loop.batch import Batch, ScoredRollouts, build_batch
from megarl.loop.learn import Learner
from megarl.loop.sampler import Sampler
from megarl.loop.scoring import RewardScorer
from megarl.rollout.response import Response

ROWS, LAYERS, EXPERTS, TOP_K = 9, 4, 8, 2
WRONG_LINE = 3  # of the second data-parallel replica; its second response


def _row(values: list[int], dtype: type = np.int16) -> Callable[[np.ndarray], np.ndarray]:
    def spoil(routes: np.ndarray) -> np.ndarray:
        routes = routes.astype(dtype)
        routes[5, 2] = values
        return routes

    return spoil


# name -> (how good routes become wrong, what the line must say)
CASES: dict[str, tuple[Callable[[np.ndarray], np.ndarray | None], str]] = {
    "length": (lambda r: r[:-1], "shape (8, 4, 2), not (tokens - 1, MoE layers, top-k) = (9, 4, 2)"),
    "layers": (lambda r: r[:, :3], "shape (9, 3, 2), not (tokens - 1, 4 MoE layers of 4 layers, top-k)"),
    "top_k": (lambda r: r[..., :1], "shape (9, 4, 1), not (tokens - 1, MoE layers, top-k) = (9, 4, 2)"),
    "flat": (lambda r: r.reshape(-1), "shape (72,), not (tokens - 1, 4 MoE layers of 4 layers, top-k)"),
    "dtype": (lambda r: r.astype(np.float32), "dtype float32, not an integer"),
    "too_high": (_row([8, 1]), "row 5 names expert 8, not 2 distinct experts of 0..7"),
    "negative": (_row([1, -1]), "row 5 names expert -1, not 2 distinct experts of 0..7"),
    "duplicate": (_row([6, 6]), "row 5 names an expert twice, [6, 6] in MoE layer 2, not 2 distinct experts of 0..7"),
    "all_zero": (np.zeros_like, "all zero, not 2 distinct experts of 0..7 a row: nothing was captured"),
    "missing": (lambda r: None, "none, which replay.mode R3 needs"),
}


class Given:
    """What a rollout client answers: two responses a prompt; those to the prompt on WRONG_LINE are spoilt."""

    def __init__(self) -> None:
        self.spoil: Callable[[np.ndarray], np.ndarray | None] = lambda routes: routes

    def generate(self, prompts: list[list[int]], n: int, *args: Any, **kwargs: Any) -> list[list[Response]]:
        return [[self._response(prompt, number) for number in range(n)] for prompt in prompts]

    def _response(self, prompt: list[int], number: int) -> Response:
        rng = np.random.default_rng([prompt[0], number])
        tokens = np.concatenate([prompt, rng.integers(3, 14, ROWS + 1 - len(prompt))]).astype(np.int32)
        routes: np.ndarray | None = rng.random((ROWS, LAYERS, EXPERTS)).argsort(-1)[..., :TOP_K].astype(np.uint8)
        if prompt[0] == WRONG_LINE and number == 1:
            assert routes is not None
            routes = self.spoil(routes)
        end = len(tokens) - len(prompt)
        return Response(
            tokens,
            len(prompt),
            -rng.random(end).astype(np.float32),
            routes,
            [{"version": 0, "start": 0, "end": end}],
            "length",
        )


def main(model: str, case: str | None) -> None:
    keys = [f"model.path={model}", "parallel.tp=2", "parallel.ep=2", "replay.mode=R3", "data.reward=digit_sum"]
    config = load_config(None, [*keys, "batch.prompts=4", "batch.group=2"])
    engine = build_engine(config, optimizer_steps=2)
    given, rank = Given(), engine.model.parallel.coord.rank
    client: Any = given if engine.model.parallel.is_ingest else None
    tokenizer = load_tokenizer(config.model)
    sampler = Sampler(config, engine, client, tokenizer)
    scorer = RewardScorer(config, tokenizer, fetches=client is not None)
    prompts = KeptPrompts(keeps=client is not None)
    for line in range(1, 5):
        prompts.append(Prompt([line, 5, 6], "1", f"digits {line}", line))

    def roll_out(to_learn: bool = True) -> Batch:
        rollouts = ScoredRollouts(config, engine.model.parallel, steps_done=0)
        sampled = sampler.sample(prompts, 0, 0)
        rollouts.add(sampled, scorer.score(sampled.rollouts))
        return build_batch(rollouts, engine, 0, to_learn=to_learn)

    for name, (spoil, says) in CASES.items() if case is None else [(case, CASES[case])]:
        given.spoil = spoil
        try:
            roll_out()
        except UserError as error:
            line = str(error)
            assert (
                "\n" not in line
                and f"response 1 to the prompt on line {WRONG_LINE} ('digits 3')" in line
                and says in line
            ), (name, line)
            if case is not None:
                raise
        else:
            raise AssertionError(f"{name}: not noticed on rank {rank}")
    given.spoil = lambda routes: routes
    batch = roll_out(to_learn=False)  # all rewards are equal
    values = Learner(config, engine).learn(batch, 0).metrics
    assert values["routing/agree_rollout_old"] is not None
    print(f"rank {rank}: ok {' '.join(CASES)}", flush=True)
    destroy_parallel()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
    except UserError as error:
        sys.stderr.write(f"megarl: error: {error}\n")  # one write: four ranks share the pipe
        os._exit(2)
