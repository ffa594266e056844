"""docs/paper.md and its pictures, from the results of the grid alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tools.grid.arms import COARSE, PRECISIONS, TASK, Arm, full
from tools.grid.claims import Judge, Results, claims, label, whole
from tools.grid.pictures import PICTURES, Picture, draw, swept
from tools.grid.results import COLLAPSED_BELOW, collect

NEAR_CHANCE = 0.2
JUDGED = (COARSE, "fp8_e4m3")  # the rollout precisions under which claims are judged, where there are runs


def write_report(out: Path, docs: Path, steps: int) -> int:
    """Pages from the runs under `out`, or, where there are none, from docs/paper/results.json."""
    folder = docs / "paper"
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / "results.json"
    if (out / "runs").is_dir():
        store.write_text(_compact(collect(out, steps)), encoding="utf-8")
    results = json.loads(store.read_text(encoding="utf-8"))
    drawn = []
    for picture in PICTURES + swept(results):
        name, title, key, log, arms = picture
        (folder / f"{name}.svg").unlink(missing_ok=True)
        if text := draw(results, title, key, log, arms):
            (folder / f"{name}.svg").write_text(text, encoding="utf-8")
            drawn.append(picture)
    (docs / "paper.md").write_text(render(results, drawn), encoding="utf-8")
    print(f"{len(results['runs'])} runs -> {docs / 'paper.md'}")
    return 0


def _compact(results: Results) -> str:
    """One line a run."""
    head = {key: value for key, value in results.items() if key != "runs"}
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in results["runs"])
    return json.dumps(head)[:-1] + f', "runs": [\n{lines}\n]}}\n'


def render(results: Results, pictures: list[Picture]) -> str:
    judged = {precision: claims(results, precision) for precision in JUDGED}
    judged = {
        precision: each for precision, each in judged.items() if any(claim.verdict != "not run" for claim in each)
    }
    rows = [
        f"| {same[0].name} | {same[0].text} | " + " | ".join(f"**{c.verdict}**" for c in same) + " |"
        for same in zip(*judged.values(), strict=True)
    ]
    parts = [
        f"| {c.name} | {p.text} | {p.measured or '-'} | {p.verdict} |"
        for precision, each in judged.items()
        for c in each
        for p in c.parts
        if p.verdict != "not run" or precision == COARSE
    ]
    images = [f"![{title}](paper/{name}.svg)" for name, title, *_ in pictures]
    rl = [run for run in results["runs"] if run["arm"]["kind"] == "rl"]
    return "\n".join(
        [
            HEAD.format(
                date=results["date"],
                machine=results["machine"],
                below=COLLAPSED_BELOW,
                task=TASK,
                lr=results["lr"],
                warmup=results["warmup"],
                **_sizes(rl),
            ),
            "| claim | rollouts in | " + " | ".join(judged) + " |\n|---|---|" + "---|" * len(judged),
            *rows,
            "\n## Part by part\n",
            "Reward is the mean of a run's last eighth. Medians over seeds of the first and of the second arm; then "
            "the mean of the paired",
            "differences with its 95% interval (percentiles of 10,000 bootstrap draws over seeds; with three seeds "
            "that is about their",
            "range, so that `yes` says little more than that all seeds agree).\n",
            "| claim | part | measured | holds |\n|---|---|---|---|",
            *parts,
            "\n## Arms\n",
            *_arms(results),
            "\n## Rollout precision\n",
            *_precisions(results),
            "\n## Learning rate\n",
            *_sweep(results),
            "\n## What was run\n",
            *_coverage(results),
            "\n## Curves\n",
            "Medians over seeds.\n",
            *images,
            "\n## Cost\n",
            *_cost(results),
            "",
        ]
    )


def _sizes(runs: list[Results]) -> dict[str, Any]:
    steps = sorted({run["steps"] for run in runs})
    return {
        "runs": len(runs),
        "seeds": len({run["seed"] for run in runs}),
        "steps": " and ".join(map(str, steps)) or "no",
    }


def _arms(results: Results) -> list[str]:
    judge = Judge(results)
    lines = [
        "| arm | seeds | first | best | last | collapsed | k3 | extreme | agreement | entropy, end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = {run["name"]: Arm(**run["arm"]) for run in results["runs"] if run["arm"]["kind"] == "rl"}
    for arm in sorted(names.values(), key=lambda arm: (arm.n, arm.precision != "fp32", arm.objective, arm.replay)):
        runs = list(judge.of(arm).values())
        mid = [f"{median(run[key] for run in runs):.3f}" for key in ("first", "best", "last")]
        lines.append(
            f"| {label(arm)} | {len(runs)} | {' | '.join(mid)} | {sum(run['collapsed'] for run in runs)} | "
            f"{_over(runs, 'mismatch/kl_k3', '.1e')} | {_over(runs, 'mismatch/extreme_frac_2', '.4f')} | "
            f"{_over(runs, 'routing/agree_rollout_old', '.4f')} | "
            f"{median(run['curves']['policy/entropy'][-1] for run in runs):.3f} |"
        )
    return [
        *lines,
        "",
        "first, best, last: mean reward of that eighth. k3, extreme (share of tokens with max(rho, 1/rho) > 2), "
        "agreement: run means.",
        *_how_runs_fell(results),
    ]


def _how_runs_fell(results: Results) -> list[str]:
    grid = [run for run in results["runs"] if run["arm"]["kind"] == "rl"]
    fallen = [run["best"] for run in grid if run["collapsed"]]
    missed = sum(run["last"] < NEAR_CHANCE and not run["collapsed"] for run in grid)
    if not fallen:
        return []
    return [
        f"The {len(fallen)} collapsed runs had a best eighth of {min(fallen):.3f} to {max(fallen):.3f}; "
        f"{missed} runs that the criterion does not count ended under {NEAR_CHANCE:g}."
    ]


def _over(runs: list[Results], key: str, form: str) -> str:
    values = [whole(run, key) for run in runs if run["curves"].get(key)]
    return f"{median(values):{form}}" if values else "-"


def _precisions(results: Results) -> list[str]:
    judge = Judge(results)
    keys = (("mismatch/kl_k3", ".1e"), ("mismatch/extreme_frac_2", ".4f"), ("routing/agree_rollout_old", ".4f"))
    lines = [
        "The first rollout from the cold start, the same responses with and without replay: what R3 takes out of the "
        "mismatch.",
        "fp8_e4m3, fp8_e5m2, int4: weights only, one scale a row, the router included. fp8_kv: float32 weights, keys "
        "and values in e4m3.\n",
        "| rollout | k3 | with R3 | extreme | with R3 | agreement | with R3 |",
        "|---|---|---|---|---|---|---|",
    ]
    for precision in PRECISIONS:
        pair = [list(judge.of(Arm(2, "minirl", replay, precision, "probe")).values()) for replay in ("none", "R3")]
        if not all(pair):
            lines.append(f"| {precision} | not run | | | | | |")
            continue
        cells = [f"{run[0]['curves'][key][0]:{form}}" for key, form in keys for run in pair]
        lines.append(f"| {precision} | {' | '.join(cells)} |")
    return lines


def _sweep(results: Results) -> list[str]:
    runs = sorted(
        (run for run in results["runs"] if run["arm"]["kind"] == "sweep"),
        key=lambda run: (run["arm"]["n"], run["arm"]["lr"]),
    )
    if not runs:
        return ["No sweep was run."]
    tried = sorted({run["arm"]["lr"] for run in runs})
    stable = [
        lr
        for lr in tried
        if all(not run["collapsed"] and run["last"] > run["first"] for run in runs if run["arm"]["lr"] == lr)
    ]
    lines = [
        "The fp32 control. Chance is 0.1: a rate under which a control falls there within its first eighth has not "
        "collapsed by the grid's",
        "criterion, so here a rate counts as stable if no control collapsed and each ended higher than it began. The "
        "largest such rate:",
        f"{max(stable, default=math.nan):g}. The grid runs at {results['lr']:g}.\n",
    ]
    lines += ["| N | lr | steps | first | best | last | collapsed |", "|---|---|---|---|---|---|---|"]
    for run in runs:
        cells = (
            run["arm"]["n"],
            f"{run['arm']['lr']:g}",
            run["steps"],
            run["first"],
            run["best"],
            run["last"],
            run["collapsed"],
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def _coverage(results: Results) -> list[str]:
    """How much of the full grid there is, by N and precision."""
    judge = Judge(results)
    lines = ["Arms of the full grid (`--full`) with at least one run, and the fewest seeds among these.\n"]
    lines += ["| N | rollout | arms run | seeds |", "|---|---|---|---|"]
    arms = [run.arm for run in full(1, 1) if run.arm.kind == "rl"]
    for n, precision in dict.fromkeys((arm.n, arm.precision) for arm in arms):
        some = [len(judge.of(arm)) for arm in arms if (arm.n, arm.precision) == (n, precision)]
        seeds = [count for count in some if count]
        lines.append(f"| {n} | {precision} | {len(seeds)} of {len(some)} | {min(seeds, default='-')} |")
    return lines


def _cost(results: Results) -> list[str]:
    """CPU seconds, which a neighbour on the same cores does not change much."""
    rl = [run for run in results["runs"] if run["arm"]["kind"] == "rl"]
    lines = [
        "CPU seconds, without the start of a lane; the clock's on a machine with other work. `-`: the server's share "
        "was not measured.\n"
    ]
    lines += [
        "| N | runs | trainer, a run | server, a run | trainer, a rollout | clock, a run |",
        "|---|---|---|---|---|---|",
    ]
    for n in sorted({run["arm"]["n"] for run in rl}):
        some = [run for run in rl if run["arm"]["n"] == n]
        served = [run["server_cpu_s"] for run in some if run["server_cpu_s"] is not None]
        server = f"{fmean(served):.1f}" if served else "-"
        trainer, rollout = (
            fmean(run["trainer_cpu_s"] / (run["rollouts"] if each else 1) for run in some) for each in (False, True)
        )
        lines.append(
            f"| {n} | {len(some)} | {trainer:.1f} | {server} | {rollout:.2f} | "
            f"{fmean(run['wall_s'] for run in some):.0f} |"
        )
    return lines


HEAD = """# The paper's claims, in small

Written by `python tools/paper_grid.py --report` from [paper/results.json](paper/results.json), {date}, {machine}; do not edit.
The claims are those of "Stabilizing RL with LLMs" (arXiv 2512.01374). {runs} runs, up to {seeds} seeds an arm,
{steps} optimizer steps each at a learning rate of {lr:g} after {warmup} steps of warm-up:
{task}.
Megatron trains in float32, vLLM rolls out with int4 weights (the router included) where nothing else is said.
A mini-batch is 8 prompts x 8 responses for every N. An arm with fewer than 3 seeds decides nothing.
Arms are paired: the same cold start, and at equal N the same prompts in the same order and the same sampling seeds.
A run has collapsed if its last eighth's mean reward is under {below} of its best eighth's; fixed before any run.
Chance is a reward of 0.1. The rate is the largest of those tried that float32 bears (below): every arm may stand close to where it falls.
A model this small on a task this narrow can show a mechanism; it can neither confirm nor refute what happens at 30B.
"""
