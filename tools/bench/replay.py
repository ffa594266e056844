"""What routing replay costs: the step with R3 over the step without,
and the rollout with capture over the rollout without.

    python tools/bench/replay.py [--ranks 1] [--pairs 100] [--routes
    recorded] [--only step|capture] [--json FILE] [key=value ...]

The same work in pairs, one after the other in random order, so that what else the machine does falls on both; the
figure is the median of the ratios within a pair, with a bootstrap 95% interval. A limit (1.03; capture 1.05) lies
above the interval, or below it, or it is undecided. The CPU time of all ranks is judged beside the clock: it does not
count what a neighbour on the same cores does. With PROFILE=DIR in the environment 10 more pairs run under cProfile.

step: the exchange of the responses and their routes, the pi_old pass and 4 updates, of the benchmark's work
(tools/bench/step.py: 16 prompts of 8 tokens, 8 responses each of 16 tokens). Routes travel and are compared in both;
only R3 replays them. The routes are those that the trainer itself takes (`recorded`, so that experts get the same load
in both), or random ones. The learning rate is 1e-30.

capture: two vLLM servers, one with --enable-return-routed-experts, one without; the same prompts and seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench.pairs import WARM_UP, Seconds, interleaved, on_clock, on_cpu  # noqa: E402
from tools.ranks import launch_ranks  # noqa: E402
from tools.tiny_model import make_tiny_model  # noqa: E402

LIMITS = {"step": 1.03, "capture": 1.05}
PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 8, 16
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {},  # 0.5M parameters
    "mid": dict(layers=8, hidden=192, experts=32, top_k=4, moe_intermediate=128, heads=6, kv_heads=2),  # about 20M
}


def judged(result: dict[str, Any], of: str = "step") -> dict[str, Any]:
    """With what the interval says of its limit."""
    low, high = result["interval_95"]
    limit = LIMITS[of]
    verdict = "met" if high <= limit else "not met" if low > limit else "undecided"
    return {**result, "verdict": f"at most {limit}: {verdict}"}


# ---- the step: inside the ranks


def step(folder: Path, pairs: int, routes: str, overrides: list[str]) -> None:
    import torch
    import torch.distributed as dist

    from megarl.commands.score import LIVE_ROUTES, gather_packs
    from megarl.config import load_config
    from megarl.data import Prompt
    from megarl.engine.build import build_engine
    from megarl.engine.parallel import destroy_parallel
    from megarl.loop.batch import Batch, ScoredRollouts, move
    from megarl.loop.learn import Learner
    from megarl.loop.sampler import Rollout, Sampled
    from megarl.reward.pool import Score

    keys = [
        f"model.path={folder / 'model'}",
        "train.lr=1e-30",
        "batch.minibatches=4",
        "replay.mode=R3",
        "data.reward=digit_sum",
    ]
    config = load_config(None, [*keys, *overrides])
    engine = build_engine(config, optimizer_steps=4, temperature=1.0)
    parallel = engine.model.parallel
    learners = {mode: Learner(config, engine) for mode in ("R3", "none")}
    learners["none"].replay_mode = "none"
    prompt = Prompt([], "", "", 0)
    fetched = [
        Rollout(group, prompt, response) for group, response in (_responses(engine) if parallel.is_ingest else [])
    ]
    rollouts = ScoredRollouts(config, parallel, steps_done=0)
    rollouts.add(Sampled(fetched), [Score(float(n % 3 == 0), "") for n in range(len(fetched))])
    groups = sorted({meta.group for meta in rollouts.metas})

    if routes == "recorded":
        packs = [pack for minibatch in move(rollouts, groups, engine).minibatches for pack in minibatch]
        live = {}
        for pack in gather_packs(engine, packs, engine.logprobs(packs, "record"), (LIVE_ROUTES,)):
            live |= {i: pack.values[LIVE_ROUTES][span].astype(np.uint8) for i, span in pack.spans()}
        on_all_ranks = [live]
        dist.broadcast_object_list(on_all_ranks, src=0)
        for n, rollout in zip(rollouts.numbers(), fetched, strict=True):
            rollout.response.routes = on_all_ranks[0][n]

    parts: dict[str, list[dict[str, float]]] = {mode: [] for mode in learners}

    def timed_step(mode: str) -> Seconds:
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        minibatches = move(rollouts, groups, engine).minibatches
        middle = time.perf_counter()
        names = [""] * len(rollouts.metas)
        values = learners[mode].learn(Batch(minibatches, names, {}, [], [], [[] for _ in names]), 0).metrics
        dist.barrier()
        end = time.perf_counter()
        parts[mode].append(
            {"exchange": middle - start, "old": values["time/old_logprob_s"], "update": values["time/update_s"]}
        )
        spent = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
        dist.all_reduce(spent)
        return end - start, float(spent)

    gc.freeze()
    gc.disable()
    times = interleaved(lambda: timed_step("R3"), lambda: timed_step("none"), pairs)
    if parallel.is_main:
        result = {**judged(on_clock(times)), "cpu": judged(on_cpu(times))}
        medians = {
            mode: {k: statistics.median(row[k] for row in rows[WARM_UP:]) for k in rows[0]}
            for mode, rows in parts.items()
        }
        (folder / "step.json").write_text(json.dumps({**result, "parts_s": medians}), encoding="utf-8")
    if parallel.is_main and os.environ.get("PROFILE"):
        _profile(timed_step, Path(os.environ["PROFILE"]))
    elif os.environ.get("PROFILE"):
        for mode in ("R3", "none") * 10:
            timed_step(mode)
    dist.barrier()
    destroy_parallel()


def _profile(timed_step: Callable[[str], Seconds], folder: Path) -> None:
    """cProfile of either mode, 10 steps each, interleaved."""
    import cProfile

    profiles = {mode: cProfile.Profile() for mode in ("R3", "none")}
    for mode in ("R3", "none") * 10:
        profiles[mode].enable()
        timed_step(mode)
        profiles[mode].disable()
    folder.mkdir(parents=True, exist_ok=True)
    for mode, profile in profiles.items():
        profile.dump_stats(folder / f"{mode}.prof")


def _responses(engine: Any) -> list[tuple[int, Any]]:
    """(prompt, response) of this replica's share, with random distinct experts."""
    from megarl.rollout.response import Response

    rng, parallel, weight_map = np.random.default_rng(1), engine.model.parallel, engine.model.weight_map
    layers, rows, responses = len(weight_map.moe_layers), PROMPT_TOKENS + NEW_TOKENS - 1, []
    for prompt in range(PROMPTS):
        for _ in range(GROUP):
            tokens = rng.integers(3, 24, rows + 1).astype(np.int32)
            routes = (
                rng.random((rows, layers, weight_map.num_experts)).argsort(-1)[..., : weight_map.top_k].astype(np.uint8)
            )
            logprobs = -rng.exponential(3.0, NEW_TOKENS).astype(np.float32)
            span = [{"version": 0, "start": 0, "end": NEW_TOKENS}]
            responses.append((prompt, Response(tokens, PROMPT_TOKENS, logprobs, routes, span, "length")))
    local_prompts = set(np.array_split(np.arange(PROMPTS), parallel.layout.dp)[parallel.coord.dp].tolist())
    return [(prompt, response) for prompt, response in responses if prompt in local_prompts]


def launch_step(folder: Path, ranks: int, pairs: int, routes: str, overrides: list[str]) -> dict[str, Any]:
    arguments = ["--inside", str(folder), "--pairs", str(pairs), "--routes", routes, *overrides]
    done = launch_ranks(__file__, ranks, *arguments)
    if done.returncode:
        raise SystemExit(f"the ranks failed:\n{done.stderr[-3000:]}")
    return json.loads((folder / "step.json").read_text(encoding="utf-8"))


# ---- capture


def capture(folder: Path, pairs: int, overrides: list[str]) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    prompts = rng.integers(3, 13, (PROMPTS, PROMPT_TOKENS)).tolist()
    with contextlib.ExitStack() as stack:
        on, off = (stack.enter_context(_server(folder, captured, overrides)) for captured in (True, False))

        def timed_generation(client: Any, captured: bool) -> Seconds:
            start = time.perf_counter()
            groups = client.generate(prompts, GROUP, 1.0, NEW_TOKENS, [], seed=0)
            seconds = time.perf_counter() - start
            lengths = {len(response.tokens) for group in groups for response in group}
            assert lengths == {PROMPT_TOKENS + NEW_TOKENS} and all(
                (r.routes is not None) == captured for group in groups for r in group
            )
            return seconds, 0.0

        return judged(
            on_clock(interleaved(lambda: timed_generation(on, True), lambda: timed_generation(off, False), pairs)),
            "capture",
        )


@contextlib.contextmanager
def _server(folder: Path, captured: bool, overrides: list[str]) -> Iterator[Any]:
    from megarl.rollout import registry
    from megarl.rollout.client import RolloutClient

    store = registry.open_store("127.0.0.1", 0, is_master=True, timeout_s=60)
    path = folder / f"capture_{captured}.yaml"
    rollout = {"max_prompt_tokens": PROMPT_TOKENS, "max_new_tokens": NEW_TOKENS}
    config = {
        "model": {"path": str(folder / "model")},
        "replay": {"mode": "none", "metrics": captured},
        "rollout": rollout,
    }
    config |= {"run": {"dir": str(folder / f"capture_{captured}")}, "launch": {"store": f"127.0.0.1:{store.port}"}}
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "megarl.cli", "rollout", str(path), *overrides]
    process = subprocess.Popen(command, cwd=ROOT)
    workers: list[Any] = []
    try:
        workers = registry.wait_for_workers(store, 1, 300)
        client = RolloutClient([workers[0]], 120)
        yield client
        client.close()
        registry.request_shutdown(store, workers)
        process.wait(20)
    finally:
        process.terminate()
        process.wait(20)


def show(name: str, result: dict[str, Any]) -> None:
    low, high = result["interval_95"]
    print(
        f"{name:34}{result['first_s'] * 1e3:9.1f} ms{result['second_s'] * 1e3:9.1f} ms{result['median_ratio']:9.4f}"
        f"   [{low:.4f}, {high:.4f}]   {result['verdict']}, {result['pairs']} pairs",
        flush=True,
    )
    if "cpu" in result:
        show("  CPU time of all ranks", result["cpu"])
    for part in ("exchange", "old", "update") if "parts_s" in result else ():
        print(f"  {part:32}" + "".join(f"{result['parts_s'][mode][part] * 1e3:9.1f} ms" for mode in ("R3", "none")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks", type=int, default=1, help="trainer ranks; the layout is data-parallel unless overrides say otherwise"
    )
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--routes", choices=("recorded", "random"), default="recorded")
    parser.add_argument("--only", choices=("step", "capture"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if args.inside:
        step(args.inside, args.pairs, args.routes, args.overrides)
        return
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_tiny_model(folder / "model", **MODELS[args.model])
        print(f"{'':34}{'with':>12}{'without':>12}{'ratio':>9}   95% interval")
        if args.only != "capture":
            results["step"] = launch_step(folder, args.ranks, args.pairs, args.routes, args.overrides)
            show(f"R3, {args.ranks} rank(s), {args.model}, {args.routes}", results["step"])
        if args.only != "step":
            results["capture"] = capture(folder, args.pairs, args.overrides)
            show(f"capture, {args.model}", results["capture"])
    if args.json:
        about = {
            "limits": LIMITS,
            "ranks": args.ranks,
            "model": args.model,
            "routes": args.routes,
            "overrides": args.overrides,
        }
        args.json.write_text(json.dumps({**about, **results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
