"""docs/paper.md and its pictures, from the results of the grid alone."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

from megarl.report.curves import HEIGHT, LEFT, WIDTH, Series, css, line_chart
from tools.grid.arms import COARSE, PRECISIONS, TASK, Arm, off_policy, on_policy
from tools.grid.claims import Judge, Part, Results, claims, label, whole
from tools.grid.results import COLLAPSED_BELOW, collect

CONTROL_1, CONTROL_8 = Arm(1, "minirl", "none", "fp32"), Arm(8, "minirl", "none", "fp32")
Picture = tuple[str, str, str, bool, list[Arm]]  # file, title, metric, logarithmic, arms
PICTURES: list[Picture] = [
    ("on_reward", "Mean reward, N = 1", "reward/mean", False, [CONTROL_1, *on_policy(COARSE)[:5]]),
    ("off_reward", "Mean reward, N = 8", "reward/mean", False, off_policy(8, COARSE)),
    ("on_k3", "k3 of the mismatch, N = 1", "mismatch/kl_k3", True, on_policy(COARSE)),
    ("off_k3", "k3 of the mismatch, N = 8", "mismatch/kl_k3", True, off_policy(8, COARSE)),
    ("on_entropy", "Entropy, N = 1", "policy/entropy", False, [CONTROL_1, *on_policy(COARSE)[:5]]),
    ("off_entropy", "Entropy, N = 8", "policy/entropy", False, off_policy(8, COARSE)),
    ("off_extreme", "Share of tokens with a ratio above 2, N = 8", "mismatch/extreme_frac_2", False, off_policy(8, COARSE)),
    ("off_agreement", "Routing agreement of the engines, N = 8", "routing/agree_rollout_old", False, off_policy(8, COARSE)),
    ("off_clip", "Tokens clipped with A < 0, N = 8", "staleness/clip_frac_neg", False, off_policy(8, COARSE)),
    ("off_grad_norm", "Gradient norm, N = 8", "optim/grad_norm", True, off_policy(8, COARSE)),
]


def write_report(out: Path, docs: Path, steps: int) -> int:
    """Pages from the runs under `out`, or, where there are none, from docs/paper/results.json."""
    folder = docs / "paper"
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / "results.json"
    if (out / "runs").is_dir():
        store.write_text(_compact(collect(out, steps)))
    results = json.loads(store.read_text())
    drawn = []
    for picture in PICTURES + swept(results):
        name, title, key, log, arms = picture
        (folder / f"{name}.svg").unlink(missing_ok=True)
        if text := draw(results, title, key, log, arms):
            (folder / f"{name}.svg").write_text(text)
            drawn.append(picture)
    (docs / "paper.md").write_text(render(results, drawn))
    print(f"{len(results['runs'])} runs -> {docs / 'paper.md'}")
    return 0


def swept(results: Results) -> list[Picture]:
    """Pictures of the fp32 control at every learning rate that was tried."""
    rates = sorted({run["arm"]["lr"] for run in results["runs"] if run["arm"]["kind"] == "sweep"})
    metrics = (("reward", "reward/mean"), ("entropy", "policy/entropy"), ("length", "response/length_mean"), ("k3", "mismatch/kl_k3"))
    return [
        (
            f"lr_{name}",
            f"{TITLES[name]} of the fp32 control, N = 1",
            key,
            name == "k3",
            [Arm(1, "minirl", "none", "fp32", "sweep", lr) for lr in rates],
        )
        for name, key in metrics
    ]


TITLES = {"reward": "Mean reward", "entropy": "Entropy", "length": "Mean length", "k3": "k3 of the mismatch"}


def _compact(results: Results) -> str:
    """One line a run."""
    head = {key: value for key, value in results.items() if key != "runs"}
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in results["runs"])
    return json.dumps(head)[:-1] + f', "runs": [\n{lines}\n]}}\n'


def draw(results: Results, title: str, key: str, log: bool, arms: list[Arm]) -> str:
    """Medians over seeds as one SVG file with its legend; empty where nothing was run."""
    judge, series, end = Judge(results), [], 0
    for arm in arms:
        curves = [run["curves"].get(key, []) for run in judge.of(arm).values()]
        points = max((len(curve) for curve in curves), default=0)
        if points:
            end = max(end, *(run["steps"] for run in judge.of(arm).values()))
            series.append((arm, [_median([c[i] for c in curves if i < len(c) and c[i] is not None]) for i in range(points)]))
    if not series:
        return ""
    length = max(len(values) for _, values in series)
    steps = [round((i + 1) * end / length) for i in range(length)]
    chart = line_chart(steps, [Series(label(arm), values + [None] * (length - len(values))) for arm, values in series], log=log)
    names = "".join(
        f'<line class="line s{i}" x1="{LEFT}" x2="{LEFT + 16}" y1="{HEIGHT + 28 + 15 * i}" y2="{HEIGHT + 28 + 15 * i}"/>'
        f'<text class="tick" x="{LEFT + 22}" y="{HEIGHT + 32 + 15 * i}">{escape(label(arm))}</text>'
        for i, (arm, _) in enumerate(series)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 36 + 15 * len(series)}" width="{WIDTH}" role="img">'
        f'<title>{escape(title)}</title><style>{css("svg")}</style><text class="tick" x="{LEFT}" y="13">{escape(title)}, by optimizer step'
        f'</text><g transform="translate(0 16)">{chart}</g>{names}</svg>\n'
    )


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def render(results: Results, pictures: list[Picture]) -> str:
    found = claims(results)
    rows = [f"| {c.name} | {c.text} | **{c.verdict}** |" for c in found]
    parts = [f"| {c.name} | {p.text} | {p.measured or '-'} | {_word(p)} |" for c in found for p in c.parts]
    images = [f"![{title}](paper/{name}.svg)" for name, title, *_ in pictures]
    rl = [run for run in results["runs"] if run["arm"]["kind"] == "rl"]
    return "\n".join(
        [
            HEAD.format(date=results["date"], machine=results["machine"], below=COLLAPSED_BELOW, task=TASK, **_sizes(rl)),
            "| claim | | here |\n|---|---|---|",
            *rows,
            "\n## Part by part\n",
            "Reward is the mean of a run's last eighth. Medians over seeds of the first and of the second arm; then the mean of the paired",
            "differences with its 95% interval (percentiles of 10,000 bootstrap draws over seeds; with three seeds that is about their",
            "range, so that `yes` says little more than that all seeds agree).\n",
            "| claim | part | measured | holds |\n|---|---|---|---|",
            *parts,
            "\n## Arms\n",
            *_arms(results),
            "\n## Rollout precision\n",
            *_precisions(results),
            "\n## Learning rate\n",
            *_sweep(results),
            "\n## Curves\n",
            "Medians over seeds.\n",
            *images,
            "\n## Cost\n",
            *_cost(results),
            "",
        ]
    )


def _word(part: Part) -> str:
    return part.verdict


def _sizes(runs: list[Results]) -> dict[str, Any]:
    steps = sorted({run["steps"] for run in runs})
    return {"runs": len(runs), "seeds": len({run["seed"] for run in runs}), "steps": " and ".join(map(str, steps)) or "no"}


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
            f"{_over(runs, 'routing/agree_rollout_old', '.4f')} | {median(run['curves']['policy/entropy'][-1] for run in runs):.3f} |"
        )
    return [
        *lines,
        "",
        "first, best, last: mean reward of that eighth. k3, extreme (share of tokens with max(rho, 1/rho) > 2), agreement: run means.",
    ]


def _over(runs: list[Results], key: str, form: str) -> str:
    values = [whole(run, key) for run in runs if run["curves"].get(key)]
    return f"{median(values):{form}}" if values else "-"


def _precisions(results: Results) -> list[str]:
    judge = Judge(results)
    keys = (("mismatch/kl_k3", ".1e"), ("mismatch/extreme_frac_2", ".4f"), ("routing/agree_rollout_old", ".4f"))
    lines = [
        "The first rollout from the cold start, the same responses with and without replay: what R3 takes out of the mismatch.",
        "Quantised: weight-only, one scale a row, the router included. An fp8 KV cache needs AVX-512, which this machine lacks: not run.\n",
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
    runs = sorted((run for run in results["runs"] if run["arm"]["kind"] == "sweep"), key=lambda run: (run["arm"]["n"], run["arm"]["lr"]))
    if not runs:
        return ["No sweep was run."]
    tried = sorted({run["arm"]["lr"] for run in runs})
    stable = [lr for lr in tried if all(not run["collapsed"] and run["last"] > run["first"] for run in runs if run["arm"]["lr"] == lr)]
    lines = [
        "The fp32 control. Chance is 0.1: a rate under which a control falls there within its first eighth has not collapsed by the grid's",
        "criterion, so here a rate counts as stable if no control collapsed and each ended higher than it began. The largest such rate:",
        f"{max(stable, default=math.nan):g}. The grid runs at {results['lr']:g}.\n",
    ]
    lines += ["| N | lr | steps | first | best | last | collapsed |", "|---|---|---|---|---|---|---|"]
    for run in runs:
        cells = (run["arm"]["n"], f"{run['arm']['lr']:g}", run["steps"], run["first"], run["best"], run["last"], run["collapsed"])
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def _cost(results: Results) -> list[str]:
    """CPU seconds, which a neighbour on the same cores does not change much."""
    rl = [run for run in results["runs"] if run["arm"]["kind"] == "rl"]
    lines = ["CPU seconds, without the start of a lane. `-`: the server's share was not measured.\n"]
    lines += ["| N | runs | trainer, a run | server, a run | trainer, a rollout |", "|---|---|---|---|---|"]
    for n in sorted({run["arm"]["n"] for run in rl}):
        some = [run for run in rl if run["arm"]["n"] == n]
        served = [run["server_cpu_s"] for run in some if run["server_cpu_s"] is not None]
        server = f"{fmean(served):.1f}" if served else "-"
        trainer, rollout = (fmean(run["trainer_cpu_s"] / (run["rollouts"] if each else 1) for run in some) for each in (False, True))
        lines.append(f"| {n} | {len(some)} | {trainer:.1f} | {server} | {rollout:.2f} |")
    return lines


HEAD = """# The paper's claims, in small

Written by `python tools/paper_grid.py --report` from [paper/results.json](paper/results.json), {date}, {machine}; do not edit.
The claims are those of "Stabilizing RL with LLMs" (arXiv 2512.01374). {runs} runs, up to {seeds} seeds an arm,
{steps} optimizer steps each: {task}.
Megatron trains in float32, vLLM rolls out with int4 weights (the router included) where nothing else is said.
A mini-batch is 8 prompts x 8 responses for every N. An arm with fewer than 3 seeds decides nothing.
Arms are paired: the same cold start, and at equal N the same prompts in the same order and the same sampling seeds.
A run has collapsed if its last eighth's mean reward is under {below} of its best eighth's; fixed before any run.
A model this small on a task this narrow can show a mechanism; it can neither confirm nor refute what happens at 30B.
"""
