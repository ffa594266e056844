"""Presets: the table, its round trip, and what a user reads after a typo."""

from __future__ import annotations

import pytest

from megarl.errors import UserError
from megarl.objective import ObjectiveConfig, presets, resolve_objective


@pytest.mark.parametrize("name", list(presets))
def test_round_trip(name: str) -> None:
    config = resolve_objective(name)
    assert config == presets[name] and config is not presets[name] and config.preset == name
    changed = resolve_objective({"preset": name, "eps_high": 0.5, "is_cap": 3})
    assert changed.eps_high == 0.5 and changed.clip == presets[name].clip
    assert resolve_objective(changed.model_dump(mode="json")) == changed


def test_the_default_is_minirl() -> None:
    assert resolve_objective({}) == ObjectiveConfig() == presets["minirl"]
    assert (presets["minirl"].eps_low, presets["minirl"].eps_high, presets["minirl"].is_cap) == (0.2, 0.27, 5.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("mini-rl", "'mini-rl' is unknown; did you mean 'minirl'"),
        ({"preset": "grpo", "eps_hihg": 0.3}, "'objective.eps_hihg'; did you mean 'eps_high'"),
        ({"is_cap": -1}, "'objective.is_cap' = -1"),
        ({"weight": "pi"}, "'objective.weight' = 'pi'"),
        ({"preset": "minirl", "correction": "token_mask"}, "already divides by mu"),
        ({"preset": "grpo", "correction_low": 3.0}, "correction_low 3.0 is above"),
        (["minirl"], "is a list"),
        ({"preset": None}, "None is unknown"),
    ],
)
def test_mistakes_are_one_line(value: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_objective(value)  # type: ignore[arg-type]
    assert message in str(caught.value) and "\n" not in str(caught.value)
