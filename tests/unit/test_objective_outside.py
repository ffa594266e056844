"""Objectives from outside megarl, by dotted path: the same gradient as a plain formula, and a mistake is one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megarl.config import load_config
from megarl.errors import UserError
from megarl.objective import advantages, policy_loss, resolve_objective
from megarl.objective.choices import CHOICES, find
from megarl.objective.outside import _example, _fits, try_outside
from megarl.refusals import work
from megarl.refusals.case import Case

RULES = """
import torch
from megarl.objective import Factor

def capped(tokens, config):
    r = (tokens.logprobs - tokens.rollout_logprobs).exp()
    return Factor(r.clamp(max=config.is_cap), r > config.is_cap)

def plain(tokens, config):
    return Factor(torch.full_like(tokens.logprobs, 2.0))

def only_gains(tokens, config):
    return tokens.advantages > 0

def ranks(rewards, groups, config):
    return rewards - groups.spread_sums(rewards) / groups.sizes() / 2

def a_tensor(tokens, config):
    return tokens.log_ratio.exp()

def short(tokens, config):
    return tokens.advantages[1:] > 0

def without_config(tokens):
    return Factor(tokens.logprobs)

def broken(rewards, groups, config):
    raise RuntimeError("no\\nluck")
"""


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rules.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)  # where a command runs is where its modules are found
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    find.cache_clear()


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in CHOICES.items() for name in names])
def test_every_choice_of_the_table_keeps_its_contract(part: str, name: str) -> None:
    assert _fits(part, find(part, name)(*_example(part), resolve_objective("minirl")))


def test_functions_by_dotted_path_make_the_gradient_of_their_formula(rules: None) -> None:
    own = {"weight": "my_rules.capped", "clip": "my_rules.only_gains", "advantage": "my_rules.ranks", "is_cap": 1.5}
    config = resolve_objective({"preset": "grpo", **own})
    assert load_config(None, [f"objective.{key}={value}" for key, value in own.items()]).objective.clip == own["clip"]
    try_outside(config)
    rewards = torch.tensor([1.0, 0.0, 0.5])
    adv = advantages(rewards, torch.tensor([0, 0, 1]), config)
    assert adv.tolist() == [0.75, -0.25, 0.25]
    logp = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    mu = torch.tensor([-1.3, -0.2, -4.0])
    ids = torch.arange(3)
    loss, metrics = policy_loss(logp, logp.detach(), mu, adv, torch.ones(3), ids, config, group_ids=ids)
    (grad,) = torch.autograd.grad(loss, logp)
    ratio = (logp.detach() - mu).exp().clamp(max=1.5)
    torch.testing.assert_close(grad, -ratio * adv * torch.tensor([1.0, 0.0, 1.0]) / 3)
    assert metrics["loss/weight_truncated_frac:sum"] == 1  # cut where its function says so
    none_cut = resolve_objective({"preset": "grpo", "weight": "my_rules.plain", "correction": "my_rules.plain"})
    loss, metrics = policy_loss(logp, logp.detach(), mu, adv, torch.ones(3), ids, none_cut, group_ids=ids)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], -4 * adv / 3)
    assert metrics["loss/weight_truncated_frac:sum"] == 0


@pytest.mark.parametrize(
    ("part", "name", "said"),
    [
        ("weight", "my_rules.capt", "objective.weight 'my_rules.capt': module 'my_rules' has no function 'capt'"),
        ("weight", "no_rules.capped", "importing 'no_rules' failed"),
        (
            "weight",
            "my_rules.a_tensor",
            "gave a torch.float32 tensor [3] on an example of 3; it must give Factor of [3]",
        ),
        ("weight", "my_rules.without_config", "it is called as (tokens, config)"),
        ("clip", "my_rules.short", "gave a torch.bool tensor [2] on an example of 3; it must give a bool tensor [3]"),
        ("advantage", "my_rules.broken", "(RuntimeError: no luck); it is called as (rewards, groups, config)"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(rules: None, part: str, name: str, said: str) -> None:
    config = resolve_objective({"preset": "grpo", part: name})  # reading an old run's configuration imports nothing
    with pytest.raises(UserError) as caught:
        try_outside(config)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_is_refused_by_its_objective(rules: None) -> None:
    config = load_config(None, ["objective.clip=my_rules.short"])
    with pytest.raises(UserError, match="objective.clip 'my_rules.short' gave"):
        work.objective(Case("train", config, 1, {}))


def test_an_unknown_name_shows_the_known_ones_and_the_way_out() -> None:
    with pytest.raises(UserError, match="'objective.weight' = 'ration': unknown; did you mean 'ratio'"):
        resolve_objective({"weight": "ration"})
    with pytest.raises(UserError, match="choose one of none, ratio, sequence_ratio, tv, or give a dotted path"):
        resolve_objective({"clip": "xx"})
