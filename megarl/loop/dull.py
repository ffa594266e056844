"""When a run has nothing left to learn from."""

from __future__ import annotations

from megarl.config import Config
from megarl.loop.reduce import Values


class DullSteps:
    """Counts steps in a row in which all rewards were one value: no group of them teaches anything."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.steps = 0

    def add(self, step: int, metrics: Values) -> str:
        """Why the run should stop after `step` (train.stop_on_dull_steps); "" where it should not."""
        limit, data = self.config.train.stop_on_dull_steps, self.config.data
        spread = metrics.get("reward/std", 1.0)
        assert isinstance(spread, float)
        equal = spread <= 1e-12 and not data.overlong_buffer
        self.steps = self.steps + 1 if equal else 0
        if not limit or self.steps < limit:
            return ""
        reward = metrics["reward/mean"]
        assert isinstance(reward, float)
        solved = reward >= data.pass_threshold
        fix = (
            "give harder prompts"
            if solved
            else f"read {self.config.run.dir}/rollouts/, mend data.reward or the prompts"
        )
        return (
            f"all rewards of the last {limit} steps, to step {step}, were {reward:g}: nothing is left to learn from; "
            f"{fix}, or set train.stop_on_dull_steps=0 to go on"
        )
