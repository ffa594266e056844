"""The paper's claims C1 to C8 (docs/objective.md) as comparisons
between arms, paired by seed, and a verdict on each. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, Literal

import numpy as np

from tools.grid.arms import COARSE, SECOND_START, Arm

Verdict = Literal["yes", "no", "unclear", "not run"]
Sign = Literal[">", "<", "<=", "="]
Results = dict[str, Any]
LEAST_SEEDS = 3
SAME = 0.03  # rewards closer than this count as alike
DRAWS = 10_000


@dataclass(frozen=True)
class Part:
    """One comparison: what it says, what was measured, and whether that speaks for the claim."""

    text: str
    measured: str
    verdict: Verdict


@dataclass(frozen=True)
class Claim:
    name: str
    text: str
    parts: list[Part]

    @property
    def verdict(self) -> str:
        """shown: every part that was run holds and all were run. not shown: one does not hold."""
        verdicts = {part.verdict for part in self.parts}
        if verdicts == {"not run"}:
            return "not run"
        if "no" in verdicts:
            return "not shown"
        return "shown" if verdicts == {"yes"} else "undecided"


def bootstrap(differences: list[float], level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of paired differences, resampled
    over seeds. With three seeds it is about their range.
    """
    draws = np.random.default_rng(0).choice(differences, (DRAWS, len(differences))).mean(1)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Judge:
    """Answers questions about the runs of one results file."""

    def __init__(self, results: Results) -> None:
        self.runs: dict[str, dict[int, Results]] = {}
        for run in results["runs"]:
            self.runs.setdefault(run["name"], {})[run["seed"]] = run

    def of(self, arm: Arm) -> dict[int, Results]:
        return self.runs.get(arm.name, {})

    def compare(
        self, text: str, a: Arm, b: Arm, sign: Sign, score: Callable[[Results], float], same: float = 0.0
    ) -> Part:
        """`a` against `b` in `score`, paired by seed.

        Differences within `same` of 0 are none: > and < fail where the
        interval allows no larger one, <= and = hold where it lies inside.
        """
        seeds = sorted(set(self.of(a)) & set(self.of(b)))
        if not seeds:
            return Part(text, "", "not run")
        left, right = ([score(self.of(arm)[seed]) for seed in seeds] for arm in (a, b))
        differences = [x - y for x, y in zip(left, right, strict=True)]
        low, high = bootstrap(differences)
        measured = (
            f"medians {median(left):.3g} and {median(right):.3g}, difference {fmean(differences):+.3g} [{low:+.3g}, "
            f"{high:+.3g}], "
        )
        measured += f"{len(seeds)} seeds"
        if not np.isfinite(differences).all() or len(seeds) < LEAST_SEEDS:
            return Part(text, measured, "unclear")
        holds, fails = {
            ">": (low > 0, high <= same),
            "<": (high < 0, low >= -same),
            "<=": (high <= same, low > same),
            "=": (-same <= low and high <= same, low > same or high < -same),
        }[sign]
        return Part(text, measured, "yes" if holds else "no" if fails else "unclear")

    def fate(self, arm: Arm, collapses: bool) -> Part:
        """Whether most seeds of `arm` collapse, or none does."""
        runs = list(self.of(arm).values())
        text = f"{label(arm)} {'collapses' if collapses else 'is stable'}"
        if not runs:
            return Part(text, "", "not run")
        count = sum(run["collapsed"] for run in runs)
        measured = f"{count} of {len(runs)} runs collapsed"
        if len(runs) < LEAST_SEEDS or 0 < count <= len(runs) // 2:
            return Part(text, measured, "unclear")
        return Part(text, measured, "yes" if (count > 0) == collapses else "no")

    def better(self, a: Arm, b: Arm) -> Part:
        return self.compare(f"{label(a)} ends higher than {label(b)}", a, b, ">", last, SAME)

    def every_collapse(self, precision: str) -> Part:
        """C8: the mismatch of a run that collapsed, last eighth against first."""
        text = "k3 is higher in the last eighth of a collapsed run than in its first"
        grid = [run for runs in self.runs.values() for run in runs.values() if run["arm"]["kind"] == "rl"]
        fallen = [run for run in grid if run["collapsed"] and run["arm"]["precision"] == precision]
        ratios = [
            end(run, "mismatch/kl_k3") / max(start(run, "mismatch/kl_k3"), 1e-12)
            for run in fallen
            if run["rollouts"] > 1
        ]
        if not any(run["arm"]["precision"] == precision for run in grid):
            return Part(text, "", "not run")
        if len(ratios) < LEAST_SEEDS:
            return Part(text, f"{len(ratios)} runs collapsed", "unclear")
        rose = sum(ratio > 1 for ratio in ratios)
        measured = f"it rose in {rose} of {len(ratios)} collapsed runs, by a median factor of {median(ratios):.3g}"
        return Part(text, measured, "yes" if rose == len(ratios) else "no" if rose <= len(ratios) // 2 else "unclear")


def last(run: Results) -> float:
    return run["last"]


def best(run: Results) -> float:
    return run["best"]


def start(run: Results, key: str) -> float:
    """Mean of the first eighth of a curve."""
    return _mean(run, key, slice(0, max(1, len(run["curves"].get(key, [])) // 8)))


def end(run: Results, key: str) -> float:
    """Mean of the last eighth of a curve."""
    return _mean(run, key, slice(-max(1, len(run["curves"].get(key, [])) // 8), None))


def whole(run: Results, key: str) -> float:
    return _mean(run, key, slice(None))


def _mean(run: Results, key: str, part: slice) -> float:
    values = [value for value in run["curves"].get(key, [])[part] if value is not None]
    return fmean(values) if values else float("nan")


def label(arm: Arm) -> str:
    """`MiniRL + R3, N = 8`; of a sweep its learning rate."""
    if arm.lr:
        return f"lr {arm.lr:g}"
    names = {
        "minirl": "MiniRL",
        "minirl-no-is": "no IS",
        "minirl-length-norm": "length norm",
        "minirl-no-clip": "no clip",
    }
    replay = "" if arm.replay == "none" else f" + {arm.replay}"
    other = [arm.precision] * (arm.precision != COARSE) + [f"{arm.cold} cold start"] * (arm.cold != "cold")
    return ", ".join([f"{names[arm.objective]}{replay}, N = {arm.n}", *other])


def claims(results: Results, precision: str = COARSE) -> list[Claim]:
    """Every claim with its parts, from the runs with rollouts of one precision."""
    judge = Judge(results)
    objectives = ("minirl", "minirl-no-is", "minirl-length-norm")
    on, no_is, length = (Arm(1, objective, "none", precision) for objective in objectives)
    on_r3, no_is_r3, length_r3 = (Arm(1, objective, "R3", precision) for objective in objectives)
    second = replace(SECOND_START, precision=precision)

    def off(n: int, replay: str, clip: bool = True) -> Arm:
        return Arm(n, "minirl" if clip else "minirl-no-clip", replay, precision)

    def k3(run: Results) -> float:
        return whole(run, "mismatch/kl_k3")

    def replay_wins(n: int, a: str, b: str) -> Part:
        return judge.better(off(n, a), off(n, b))

    c1 = [judge.fate(on, False), *(judge.better(on, other) for other in (no_is, length, on_r3, no_is_r3, length_r3))]
    entropy = judge.compare(
        "its entropy ends lower than MiniRL's", no_is, on, "<", lambda run: end(run, "policy/entropy")
    )
    c4 = [
        judge.compare("R3 lowers k3", on_r3, on, "<", k3),
        judge.compare("R3 ends no higher than no replay", on_r3, on, "<=", last, SAME),
    ]
    c5 = [judge.fate(off(8, "R3"), False)]
    for n in (2, 4, 8):
        strong, weak = ("R2", "R3") if n == 2 else ("R3", "R2")
        c5 += [
            replay_wins(n, strong, "none"),
            judge.better(off(n, strong), off(n, strong, clip=False)),
            replay_wins(n, strong, weak),
        ]
        c5 += [judge.fate(off(n, "R2"), True)] if n > 2 else []
    c6 = judge.compare("another cold start ends as the first", second, on, "=", last, SAME)
    alike = [
        judge.compare(f"peak of {label(off(n, r))} as of {label(on)}", off(n, r), on, "=", best, SAME) for n, r in PEAKS
    ]
    return [
        Claim("C1", "On-policy, MiniRL with the IS weight, no length norm, no replay is best and most stable", c1),
        Claim(
            "C2",
            "Without the IS weight: collapse, entropy falls",
            [judge.fate(no_is, True), judge.fate(on, False), entropy],
        ),
        Claim("C3", "Length norm: stable but worse", [judge.fate(length, False), judge.better(on, length)]),
        Claim("C4", "On-policy R3 lowers the KL but gains nothing", c4),
        Claim(
            "C5",
            "Off-policy: clipping and replay both needed; N = 2: R2 over R3; N = 4, 8: R3 over R2, and R2 does not "
            "last",
            c5,
        ),
        Claim("C6", "Different cold starts end alike", [c6]),
        Claim("C7", "On- and off-policy, once stable, peak alike", alike),
        Claim("C8", "The KL rises with every collapse", [judge.every_collapse(precision)]),
    ]


PEAKS = ((2, "R2"), (4, "R3"), (8, "R3"))
