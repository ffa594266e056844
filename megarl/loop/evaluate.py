"""The policy on validation prompts: mean@k and pass@k."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist

from megarl.config import EvalConfig
from megarl.data import Prompt
from megarl.loop.reduce import Values
from megarl.loop.sampler import Sampler
from megarl.loop.scoring import RewardScorer
from megarl.reward.pool import Score


def evaluate(sampler: Sampler, scorer: RewardScorer, prompts: list[Prompt], settings: EvalConfig) -> Values:
    """k = settings.samples responses a prompt; the same reward as in training (0 where it fails), a temperature of its
    own. Collective.
    """
    scores = scorer.score(sampler.sample_for_evaluation(prompts, settings.samples, settings.temperature))
    gathered: list[list[Score]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, scores)
    everyone = [score for rank in gathered for score in rank]
    rewards = np.array([0.0 if score.fault else score.value for score in everyone]).reshape(-1, settings.samples)
    return {
        "eval/mean_at_k": float(rewards.mean()),
        "eval/pass_at_k": float((rewards.max(1) > 0).mean()),
        "eval/k": float(settings.samples),
        "eval/bad_samples": float(sum(bool(score.fault) for score in everyone)),
    }
