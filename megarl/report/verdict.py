"""Whether a run is healthy, and if not, which curves are out of line: the rules of thresholds.py on its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, pvariance
from typing import Any

from megarl.report.thresholds import GUIDE, LEAST_STEPS, RISING, RULES, Precision, Rule

Rows = list[dict[str, Any]]
Values = list[float | None]  # one a step
FLOAT32_CANARY = 1e-3  # both engines in float32 agree better than this; megarl.loop.canary stops a run that does not


@dataclass(frozen=True)
class Finding:
    """A curve that is out of line: in words, and by which rule."""

    text: str
    rule: Rule

    @property
    def link(self) -> str:
        return f"{GUIDE}#{self.rule.section}"

    @property
    def line(self) -> str:
        return f"{self.text}: {self.rule.change} ({self.link})"


@dataclass(frozen=True)
class Verdict:
    """findings: in the order in which docs/stability.md looks; mend the first. steps: how many were seen."""

    findings: list[Finding]
    steps: int

    @property
    def healthy(self) -> bool:
        return not self.findings

    @property
    def text(self) -> str:
        """One line."""
        if self.findings:
            return "out of line: " + "; ".join(finding.text for finding in self.findings)
        if self.steps < LEAST_STEPS:
            return f"nothing out of line in {self.steps} step{'s' * (self.steps != 1)}, too few to see a trend"
        return "healthy"

    @property
    def lines(self) -> list[str]:
        """For a terminal: a line, or one for each finding with what to change and where that is explained."""
        if not self.findings:
            return [f"verdict: {self.text}"]
        return ["verdict: out of line, in the order to look at:", *(f"  {finding.line}" for finding in self.findings)]


def number(value: Any) -> float | None:
    """A finite number of a row, else None: null, NaN, a list, a text."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def column(rows: Rows, key: str) -> Values:
    return [number(row.get(key)) for row in rows]


def first_eighth(rows: Rows, key: str) -> float | None:
    """As last_eighth, of the steps that a run began with."""
    values = column(rows, key)
    return _mean(values[: max(1, len(values) // 8)])


def last_eighth(rows: Rows, key: str) -> float | None:
    """Mean of `key` over the last eighth of the steps, at least one; None where it is missing."""
    return _mean(_end(column(rows, key)))


def judge(rows: Rows, precision: Precision) -> Verdict:
    """The verdict on a run. At most one finding a metric and section: of two rules that it breaks, the first."""
    findings: list[Finding] = []
    for rule in RULES:
        if any(finding.rule.key == rule.key and finding.rule.section == rule.section for finding in findings):
            continue
        text = _broken(rule, rule.level_at(precision), rows)
        if text:
            findings.append(Finding(text, rule))
    return Verdict(findings, len(rows))


def judge_figures(figures: Mapping[str, Any], precision: Precision) -> list[Finding]:
    """The rules that need no history, on the figures of one comparison of the engines."""
    rules = [rule for rule in RULES if rule.kind in ("above", "below")]
    return [f for rule in rules if (f := _level(rule, rule.level_at(precision), number(figures.get(rule.key))))]


def precision_of(config: Mapping[str, Any], rows: Rows) -> Precision:
    """How coarse the coarser engine is, by the run's config.yaml; where that leaves it open, by the canary."""
    engine, rollout, sync = (section if isinstance(section := config.get(n), dict) else {} for n in _SECTIONS)
    if (
        rollout.get("max_lag")  # between sampling and update the policy moves on, and k3 holds that too
        or sync.get("quantize", "none") != "none"
        or rollout.get("quantization", "none") != "none"
        or rollout.get("kv_cache_dtype", "auto") != "auto"
    ):
        return "low"
    trained = str(engine.get("dtype", "auto"))
    dtypes = {trained, trained if (dtype := str(rollout.get("dtype", "auto"))) == "auto" else dtype}
    if "auto" not in dtypes:
        return "float32" if dtypes == {"float32"} else "bfloat16"
    canary = [value for value in column(rows, "sync/canary_max_diff") if value is not None]
    return "float32" if canary and max(canary) <= FLOAT32_CANARY and dtypes <= {"auto", "float32"} else "bfloat16"


_SECTIONS = ("engine", "rollout", "sync")


def _broken(rule: Rule, level: float, rows: Rows) -> str:
    """What is wrong by this rule, in words; empty where nothing is."""
    values = column(rows, rule.key)
    end = _mean(_end(values))
    if rule.kind in ("above", "below"):
        finding = _level(rule, level, end)
        return (
            "" if finding is None else finding.text + (" and rising" if end is not None and _rises(end, values) else "")
        )
    if len(rows) < LEAST_STEPS:
        return ""
    if rule.kind == "idle":
        tail = _end(values)
        idle = sum(not value for value in tail)
        return f"no update in {idle} of the last {len(tail)} steps" if idle >= level * len(tail) else ""
    if end is None:
        return ""
    if rule.kind == "rising":
        return f"{rule.name} {show(end)} and rising" if end > level and _rises(end, values) else ""
    if rule.kind == "jumped":
        before = _present(values[: -len(_end(values))])
        usual, now = median(before) if before else 0.0, median(_present(_end(values)))
        return f"{rule.name} {show(now)}, usually {show(usual)}" if usual > 0 and now > level * usual else ""
    if rule.kind == "fell":
        return _fell(rule, level, values)
    lowest = min(_eighths(values), default=end)
    turned = end > level * lowest and not _at_best(column(rows, "reward/mean"))
    return f"{rule.name} {show(end)}, up from {show(lowest)}, while the reward is not at its best" if turned else ""


def _level(rule: Rule, level: float, end: float | None) -> Finding | None:
    if end is None or not (end > level if rule.kind == "above" else end < level):
        return None
    return Finding(f"{rule.name} {show(end)} ({rule.kind} {show(level)})", rule)


def _fell(rule: Rule, level: float, values: Values) -> str:
    """Under `level` of the best eighth, and by more than three standard errors, so that noise is no fall."""
    blocks = [_present(block) for block in _blocks(values)]
    blocks = [block for block in blocks if block]
    if len(blocks) < 2:
        return ""
    best, end = max(blocks, key=fmean), blocks[-1]
    noise = math.sqrt(sum(pvariance(block) / max(1, len(block) - 1) for block in (best, end)))
    drop = fmean(best) - fmean(end)
    if drop <= (1 - level) * abs(fmean(best)) or drop <= 3 * noise:
        return ""
    return f"{rule.name} fell from {show(fmean(best))} to {show(fmean(end))}"


def _at_best(reward: Values) -> bool:
    """Whether the last eighth's reward is within a tenth of the best eighth's."""
    means = _eighths(reward)
    return not means or means[-1] >= max(means) - 0.1 * abs(max(means))


def _rises(end: float, values: Values) -> bool:
    present = _present(values)
    return len(values) >= LEAST_STEPS and end > RISING * median(present)


def _blocks(values: Values) -> list[Values]:
    size = max(1, len(values) // 8)
    return [values[max(0, stop - size) : stop] for stop in range(len(values), 0, -size)][::-1]


def _eighths(values: Values) -> list[float]:
    return [mean for block in _blocks(values) if (mean := _mean(block)) is not None]


def _end(values: Values) -> Values:
    return values[-max(1, len(values) // 8) :]


def _present(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Values) -> float | None:
    present = _present(values)
    return fmean(present) if present else None


def show(value: float) -> str:
    """Three digits; small and large ones with an exponent: 0.39, 5e-09, 1.2e+04."""
    return f"{value:.3g}"
