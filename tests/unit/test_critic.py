"""PPO's critic as the trainer uses it, judged and updated on one batch
again and again: it must come to know that batch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.config import load_config
from megarl.engine.batch import make_packs
from megarl.engine.build import build_engine
from megarl.engine.critic import value_map
from megarl.engine.parallel import destroy_parallel
from megarl.estimate.memory import critic_held, held_of, stage_held
from megarl.loop.critic_step import CriticStep, explained
from megarl.objective import finish
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.tiny_model import make_tiny_model

PROMPTS, RESPONSES, ROUNDS = [3, 5, 2, 4, 6, 3], [5, 1, 4, 7, 2, 6], 30
REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]


def test_the_critic_comes_to_explain_a_batch_it_sees_again_and_again(tmp_path: Path) -> None:
    config = load_config(
        None, [f"model.path={make_tiny_model(tmp_path / 'model', layers=2)}", "objective.preset=ppo", "critic.lr=3e-3"]
    )
    policy = build_engine(config, optimizer_steps=1)
    critic_step, at = CriticStep(config, policy), policy.model.parallel
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 20, (p + r,), generator=generator) for p, r in zip(PROMPTS, RESPONSES)]
    packs = make_packs([[0, 1, 2], [3, 4, 5]], tokens, PROMPTS, at.layout, at.coord)
    found = []
    for _ in range(ROUNDS):
        for pack in packs:
            pack.rollout.rewards = torch.tensor(REWARDS)[[pack.responses[i] for i in pack.seq_ids]]
        critic_step.value(packs)
        first, second = critic_step.gradients(packs)
        critic_step.critic.step()
        found.append(explained(finish({key: first[key] + second[key] for key in first}))["critic/explained_variance"])
    for pack in packs:
        for start, i in zip(
            pack.starts, pack.responses
        ):  # at every response token, the last one among them: nothing is shifted by a row
            values = pack.passes.old_values[start + PROMPTS[i] - 1 : start + PROMPTS[i] + RESPONSES[i] - 1]
            torch.testing.assert_close(values, torch.full((RESPONSES[i],), REWARDS[i]), atol=0.1, rtol=0)
    assert found[0] < 0.1 and found[-1] > 0.95
    destroy_parallel()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", [Layout(world=2), Layout(tp=2, pp=2, ep=2, world=4)], ids=str)
def test_what_a_critic_holds_is_planned(hf_config: dict[str, Any], layout: Layout, tied: bool) -> None:
    hf = {**hf_config, "tie_word_embeddings": tied}
    policy, critic = WeightMap(hf), value_map(hf)
    for stage in range(layout.pp):
        held = held_of(critic.params(layout, layout.coord(stage * (layout.world // layout.pp))))
        assert critic_held(policy, layout, stage, stage_held(policy, layout, stage)) == held
