"""What the scores of an evaluation say of the policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megarl.reward.pool import Score


def evaluation_figures(scores: Sequence[Score], samples: int, threshold: float) -> dict[str, float]:
    """mean@k: mean reward over all responses, k = `samples` a prompt; pass@k: share of the prompts with a response
    whose reward is at least `threshold`. scores: prompt by prompt.

    A response whose reward failed is left out and counted; so is a prompt without any other.
    """
    rewards = np.array([np.nan if score.fault else score.value for score in scores]).reshape(-1, samples)
    sound = ~np.isnan(rewards)
    some = sound.any(1)
    figures = {"eval/k": float(samples), "eval/bad_samples": float((~sound).sum())}
    if some.any():
        figures["eval/mean_at_k"] = float(rewards[sound].mean())
        figures["eval/pass_at_k"] = float((np.where(sound, rewards, -np.inf)[some].max(1) >= threshold).mean())
    return figures
