"""The runs of the grid: which arms, on which seeds, with which keys. Pure; everything else of a run is in
examples/paper_grid/base.yaml.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megarl.config import Config, load_config

BASE = Path(__file__).resolve().parents[2] / "examples" / "paper_grid" / "base.yaml"
DIGITS = 10  # of a sum; the quickstart has 5: longer sums, so that a run does not saturate
TASK = f"sums of {DIGITS} digits modulo 10, a Qwen3-MoE of about 0.3M parameters (3 layers, 8 experts, top-2)"
COLD_STARTS = {
    "cold": [],
    "other": ["run.seed=1", "train.steps=500"],
}  # folder below task/ -> its keys; two of them for C6
PROMPTS = 8  # of a mini-batch: the global batch is PROMPTS x N
COARSE = "int4"  # the low precision of the stated subset: where an effect that exists should show first

PRECISIONS: dict[str, list[str]] = {
    "fp32": [],
    "bf16": ["rollout.dtype=bfloat16", "sync.canary_tolerance=0.5"],
    "fp8_e4m3": ["sync.quantize=fp8_e4m3", "sync.quantize_also=[router]"],
    "fp8_e5m2": ["sync.quantize=fp8_e5m2", "sync.quantize_also=[router]"],
    "int4": ["sync.quantize=int4", "sync.quantize_also=[router]"],
    "fp8_kv": [
        "rollout.kv_cache_dtype=fp8",
        "sync.canary_tolerance=5",
    ],  # the canary of 64 random tokens differed by 1.4
}
OWN_SERVER = (
    "bf16",
    "fp8_kv",
)  # precisions that vLLM is started with; quantised weights are sent, and the server does not know
ON_POLICY = ("minirl", "minirl-no-is", "minirl-length-norm")
OFF_POLICY = ("minirl", "minirl-no-clip")
RECORD = "grid.json"  # in the folder of a run that has ended: its arm, what it cost, and why it failed if it did
STEPS = 256  # optimizer steps of a run
PROBE_STEPS = 2
RATES = (5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3)  # of the sweep


@dataclass(frozen=True)
class Arm:
    """N mini-batches a rollout, objective, routing replay, rollout precision,
    cold start. kind: rl, sweep (learning rates) or probe (precisions)."""

    n: int
    objective: str
    replay: str
    precision: str
    kind: str = "rl"
    lr: float | None = None
    cold: str = "cold"

    @property
    def name(self) -> str:
        name = f"n{self.n}-{self.objective}-{self.replay.lower()}-{self.precision}" + (
            f"-{self.cold}" if self.cold != "cold" else ""
        )
        return name if self.kind == "rl" else f"{self.kind}-{name}" + (f"-lr{self.lr:g}" if self.lr else "")


@dataclass(frozen=True)
class Run:
    arm: Arm
    seed: int
    steps: int  # optimizer steps

    @property
    def lr(self) -> float:
        return self.arm.lr or base().train.lr

    @property
    def name(self) -> str:
        """Of its folder. Another rate or another length is another run."""
        kind = "" if self.arm.kind == "rl" else f"{self.arm.kind}-"
        arm = dataclasses.replace(self.arm, kind="rl", lr=None)
        return f"{kind}{arm.name}-lr{self.lr:g}-t{self.steps}-s{self.seed}"

    @property
    def server(self) -> str:
        """Runs of the same kind of vLLM server can share one."""
        return self.arm.precision if self.arm.precision in OWN_SERVER else "fp32"

    def overrides(self, out: Path) -> list[str]:
        arm, task = self.arm, out / "task"
        keys = [
            f"model.path={task / arm.cold}",
            f"data.prompts={task / 'train.jsonl'}",
            f"run.dir={out / 'runs' / self.name}",
        ]
        keys += [f"objective={arm.objective}", f"replay.mode={arm.replay}", f"run.seed={self.seed}"]
        keys += [
            f"batch.minibatches={arm.n}",
            f"batch.prompts={PROMPTS * arm.n}",
            f"train.steps={max(1, self.steps // arm.n)}",
        ]
        return keys + PRECISIONS[arm.precision] + ([f"train.lr={arm.lr}"] if arm.lr else [])

    def config(self, out: Path) -> Config:
        return load_config(BASE, self.overrides(out))


@cache
def base() -> Config:
    """What all runs share."""
    return load_config(BASE)


def on_policy(precision: str) -> list[Arm]:
    return [Arm(1, objective, replay, precision) for objective in ON_POLICY for replay in ("none", "R3")]


def off_policy(n: int, precision: str) -> list[Arm]:
    return [Arm(n, objective, replay, precision) for objective in OFF_POLICY for replay in ("none", "R2", "R3")]


SECOND_START = Arm(1, "minirl", "none", COARSE, cold="other")


def probes() -> list[Arm]:
    """A few steps from the cold start in every precision, with and without replay: their
    first rollouts are the same.
    """
    return [Arm(2, "minirl", replay, precision, "probe") for precision in PRECISIONS for replay in ("none", "R3")]


def subset(seeds: int, steps: int) -> list[Run]:
    """N = 1 and N = 8 under COARSE, their fp32 controls, a second cold start, and the probes of every precision.

    Seed by seed, so that a cut leaves pairs.
    """
    arms = [
        Arm(1, "minirl", "none", "fp32"),
        *on_policy(COARSE),
        Arm(8, "minirl", "none", "fp32"),
        *off_policy(8, COARSE),
        SECOND_START,
    ]
    runs = [Run(arm, 0, PROBE_STEPS) for arm in probes() if arm.precision not in OWN_SERVER]
    runs += [Run(arm, seed, steps) for seed in range(seeds) for arm in arms]
    return runs + [Run(arm, 0, PROBE_STEPS) for arm in probes() if arm.precision in OWN_SERVER]


def full(seeds: int, steps: int) -> list[Run]:
    """Every arm at N = 1, 2, 4, 8 in every precision; the low ones first, since they are what the claims are about."""
    arms = [arm for n in (1, 2, 4, 8) for arm in (on_policy(COARSE) if n == 1 else off_policy(n, COARSE))]
    arms += [Arm(n, "minirl", "none", "fp32") for n in (1, 2, 4, 8)] + [SECOND_START]
    for precision in ("fp8_e5m2", "fp8_e4m3", "bf16"):
        arms += [arm for n in (1, 8) for arm in (on_policy(precision) if n == 1 else off_policy(n, precision))]
    return [Run(arm, 0, PROBE_STEPS) for arm in probes()] + [
        Run(arm, seed, steps) for seed in range(seeds) for arm in arms
    ]


def sweep(rates: Sequence[float], steps: int) -> list[Run]:
    """The fp32 control over learning rates, on- and off-policy, one seed."""
    return [Run(Arm(n, "minirl", "none", "fp32", "sweep", lr), 0, steps) for lr in rates for n in (1, 8)]


def servers(runs: list[Run]) -> Iterator[str]:
    """The kinds of server that `runs` need, each once, in their order."""
    yield from dict.fromkeys(run.server for run in runs)


def ended(out: Path, run: Run) -> bool:
    return (out / "runs" / run.name / RECORD).is_file()
