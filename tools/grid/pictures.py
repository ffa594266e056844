"""The pictures of docs/paper.md: one metric of several arms, medians over seeds, as SVG files that stand alone."""

from __future__ import annotations

from html import escape
from statistics import median

from megarl.report.curves import HEIGHT, LEFT, WIDTH, Series, css, line_chart
from tools.grid.arms import COARSE, Arm, off_policy, on_policy
from tools.grid.claims import Judge, Results, label

CONTROL_1, CONTROL_8 = Arm(1, "minirl", "none", "fp32"), Arm(8, "minirl", "none", "fp32")
Picture = tuple[str, str, str, bool, list[Arm]]  # file, title, metric, logarithmic, arms
PICTURES: list[Picture] = [
    ("on_reward", "Mean reward, N = 1", "reward/mean", False, [CONTROL_1, *on_policy(COARSE)[:5]]),
    ("off_reward", "Mean reward, N = 8", "reward/mean", False, off_policy(8, COARSE)),
    ("on_k3", "k3 of the mismatch, N = 1", "mismatch/kl_k3", True, on_policy(COARSE)),
    ("off_k3", "k3 of the mismatch, N = 8", "mismatch/kl_k3", True, off_policy(8, COARSE)),
    ("on_entropy", "Entropy, N = 1", "policy/entropy", False, [CONTROL_1, *on_policy(COARSE)[:5]]),
    ("off_entropy", "Entropy, N = 8", "policy/entropy", False, off_policy(8, COARSE)),
    (
        "off_extreme",
        "Share of tokens with a ratio above 2, N = 8",
        "mismatch/extreme_frac_2",
        False,
        off_policy(8, COARSE),
    ),
    (
        "off_agreement",
        "Routing agreement of the engines, N = 8",
        "routing/agree_rollout_old",
        False,
        off_policy(8, COARSE),
    ),
    ("off_clip", "Tokens clipped with A < 0, N = 8", "staleness/clip_frac_neg", False, off_policy(8, COARSE)),
    ("off_grad_norm", "Gradient norm, N = 8", "optim/grad_norm", True, off_policy(8, COARSE)),
]
TITLES = {"reward": "Mean reward", "entropy": "Entropy", "length": "Mean length"}


def swept(results: Results) -> list[Picture]:
    """Pictures of the fp32 control at every learning rate that was tried."""
    rates = sorted({run["arm"]["lr"] for run in results["runs"] if run["arm"]["kind"] == "sweep"})
    arms = [Arm(1, "minirl", "none", "fp32", "sweep", lr) for lr in rates]
    keys = {"reward": "reward/mean", "entropy": "policy/entropy", "length": "response/length_mean"}
    return [
        (f"lr_{name}", f"{TITLES[name]} of the fp32 control, N = 1", key, False, arms) for name, key in keys.items()
    ]


def draw(results: Results, title: str, key: str, log: bool, arms: list[Arm]) -> str:
    """Medians over seeds as one SVG file with its legend; empty where nothing was run."""
    judge, series, end = Judge(results), [], 0
    for arm in arms:
        curves = [run["curves"].get(key, []) for run in judge.of(arm).values()]
        points = max((len(curve) for curve in curves), default=0)
        if points:
            end = max(end, *(run["steps"] for run in judge.of(arm).values()))
            series.append(
                (arm, [_median([c[i] for c in curves if i < len(c) and c[i] is not None]) for i in range(points)])
            )
    if not series:
        return ""
    length = max(len(values) for _, values in series)
    steps = [round((i + 1) * end / length) for i in range(length)]
    chart = line_chart(
        steps, [Series(label(arm), values + [None] * (length - len(values))) for arm, values in series], log=log
    )
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
