"""policy_loss against docs/objective.md: every preset against PPO-style
surrogates written as loops, and the facts it lists.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megarl.objective import (
    ObjectiveConfig,
    denominators,
    finish,
    merge,
    policy_loss,
    presets,
    resolve_objective,
    value_loss,
)

LENGTHS = [1, 4, 2, 7, 3, 5, 0, 2, 6, 1, 3, 4]
GROUPS = [10, 10, 10, 3, 3, 3, 99, 99, 99, 5, 5, 5]
ARGUMENTS = ("logprobs", "old_logprobs", "rollout_logprobs", "advantages", "mask", "seq_ids")


def batch(seed: int = 0, spread: float = 0.5, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Packed responses of LENGTHS after two masked prompt tokens each; response 6 is masked entirely."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.tensor([i for i, length in enumerate(LENGTHS) for _ in range(length + 2)])
    mask = torch.tensor([float(t >= 2) for length in LENGTHS for t in range(length + 2)], dtype=dtype)
    old = -3 * torch.rand(len(index), generator=generator, dtype=dtype) - 0.01

    def near(x: torch.Tensor) -> torch.Tensor:
        return x + spread * torch.randn(len(index), generator=generator, dtype=dtype)

    return {
        "logprobs": near(old).requires_grad_(),
        "old_logprobs": old,
        "rollout_logprobs": near(old),
        "advantages": torch.randn(len(LENGTHS), generator=generator, dtype=dtype)[index],
        "mask": mask,
        "seq_ids": 1000 - 7 * index,
        "group_ids": torch.tensor(GROUPS)[index],
    }


def gradient(data: dict[str, torch.Tensor], config: ObjectiveConfig, **more: object) -> torch.Tensor:
    data = {**data, "logprobs": data["logprobs"].detach().requires_grad_()}
    loss, _ = policy_loss(*(data[name] for name in ARGUMENTS), config, **{"group_ids": data["group_ids"], **more})
    return torch.autograd.grad(loss, data["logprobs"])[0]


def surrogate(name: str, logp: torch.Tensor, old: float, mu: float, adv: float, s: torch.Tensor) -> torch.Tensor:
    """What the papers maximise for one token, gradients flowing as they
    do there; s is the differentiable sequence ratio.
    """
    r = (logp - old).exp()
    sg = r.item()
    inside = not ((adv > 0 and sg > 1.27) or (adv < 0 and sg < 0.8))
    weight = min(math.exp(logp.item() - mu), 5.0)

    def ppo(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.minimum(x * adv, x.clamp(1 - low, 1 + high) * adv)

    if name == "reinforce":
        return adv * logp
    if name in ("minirl", "minirl-length-norm"):
        return inside * weight * adv * logp
    if name == "minirl-no-is":
        return inside * r * adv
    if name == "minirl-no-clip":
        return weight * adv * logp
    if name in ("grpo", "dr-grpo", "ppo"):
        return ppo(r, 0.2, 0.2)
    if name == "dapo":
        return ppo(r, 0.2, 0.28)
    if name == "cispo":
        return min(sg, 1.27) * adv * logp  # MiniMax-M1 tunes the upper bound alone
    if name == "gspo":
        return ppo(s, 3e-4, 4e-4)
    if name == "sapo":
        tau = 1.0 if adv > 0 else 1.05
        return 4 / tau * torch.sigmoid(tau * (r - 1)) * adv
    assert name == "dppo-tv"
    r = (logp - mu).exp()  # both the mask and the ratio of DPPO refer to the rollout policy
    far = abs(math.exp(logp.item()) - math.exp(mu)) > 0.2
    blocked = far and ((adv > 0 and r.item() > 1) or (adv < 0 and r.item() < 1))
    return 0.0 * r if blocked else r * adv


def loop_gradient(name: str, data: dict[str, torch.Tensor]) -> torch.Tensor:
    logp = data["logprobs"].detach().requires_grad_()
    responses: dict[int, list[int]] = {}
    for t, seq in enumerate(data["seq_ids"].tolist()):
        responses.setdefault(seq, []).extend([t] if data["mask"][t] else [])
    total_tokens = int(data["mask"].sum())
    group_tokens = {g: sum(length for length, h in zip(LENGTHS, GROUPS) if h == g) for g in GROUPS}
    objective = torch.zeros((), dtype=logp.dtype)
    for tokens in responses.values():
        if not tokens:
            continue
        s = torch.stack([logp[t] - data["old_logprobs"][t] for t in tokens]).mean().exp()
        for t in tokens:
            term = surrogate(
                name,
                logp[t],
                float(data["old_logprobs"][t]),
                float(data["rollout_logprobs"][t]),
                float(data["advantages"][t]),
                s,
            )
            if name in ("minirl-length-norm", "grpo", "gspo", "sapo"):
                term = term / len(tokens) / len(responses)
            elif name == "dr-grpo":
                term = term / 256 / len(responses)
            elif name in ("dapo", "ppo"):
                term = term / total_tokens
            elif name == "cispo":
                term = term / group_tokens[int(data["group_ids"][t])] / len(group_tokens)
            else:
                term = term / len(responses)
            objective = objective + term
    return torch.autograd.grad(-objective, logp)[0]


@pytest.mark.parametrize("name", list(presets))
def test_preset_has_the_gradient_of_its_surrogate(name: str) -> None:
    # GSPO clips at 3e-4: only a small spread leaves sequences on both sides of it.
    for seed, spread in itertools.product(range(3), (3e-4, 0.1, 0.8) if name == "gspo" else (0.1, 0.8)):
        data = batch(seed, spread)
        torch.testing.assert_close(gradient(data, presets[name]), loop_gradient(name, data), rtol=1e-9, atol=1e-14)


def test_fault_26_dppo_does_not_look_at_the_recomputed_policy() -> None:
    """DPPO, arXiv 2602.04879 eq 12 and 23: r = pi_theta/mu; masked where |pi_theta - mu| > delta, away from mu.

    Token by token: inside; far up under A > 0, masked; the same under A < 0, kept; a rare token's ratio of 40, kept.
    """
    now = torch.tensor([0.50, 0.90, 0.90, 0.04, 0.10], dtype=torch.float64).log()
    mu = torch.tensor([0.40, 0.60, 0.60, 0.001, 0.80], dtype=torch.float64).log()
    adv = torch.tensor([1.0, 1.0, -1.0, 2.0, -1.0], dtype=torch.float64)
    for old in (now, mu, now - 3):
        data = {"logprobs": now, "old_logprobs": old, "rollout_logprobs": mu, "advantages": adv, "group_ids": None}
        data |= {"mask": torch.ones(5), "seq_ids": torch.zeros(5, dtype=torch.long)}
        grad = gradient(data, presets["dppo-tv"])
        torch.testing.assert_close(grad, -torch.tensor([1.25, 0.0, -1.5, 80.0, 0.0], dtype=torch.float64))


def test_fault_26_cispo_has_no_lower_clip() -> None:
    """CISPO, arXiv 2506.13585 eq 5: the weight clip(r, 1 - eps_low, 1 + eps_high); the paper imposes no lower bound."""
    now = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64).log()
    old = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64).log()
    data = {"logprobs": now, "old_logprobs": old, "rollout_logprobs": old, "advantages": torch.ones(3).double()}
    data |= {"mask": torch.ones(3), "seq_ids": torch.zeros(3, dtype=torch.long), "group_ids": torch.zeros(3)}
    expected = -torch.tensor([0.2, 1.0, 1.27], dtype=torch.float64) / 3
    torch.testing.assert_close(gradient(data, presets["cispo"]), expected)


def test_every_branch_of_minirl_is_exercised() -> None:
    data = batch(1, 0.8)
    _, metrics = policy_loss(*(data[name] for name in ARGUMENTS), presets["minirl"])
    values = finish(metrics)
    assert (
        min(
            values[f"{key}"]
            for key in ("staleness/clip_frac_pos", "staleness/clip_frac_neg", "loss/weight_truncated_frac")
        )
        > 0
    )


def test_minirl_is_decoupled_ppo_clip_where_the_cap_is_inactive() -> None:
    data = batch(2, 0.3)
    logp = data["logprobs"]
    assert (logp - data["rollout_logprobs"]).exp().max() < 5
    r = (logp - data["old_logprobs"]).exp()
    weight = (data["old_logprobs"] - data["rollout_logprobs"]).exp()
    clipped = torch.minimum(r * data["advantages"], r.clamp(0.8, 1.27) * data["advantages"])
    expected = torch.autograd.grad(-(data["mask"] * weight * clipped).sum() / len(LENGTHS), logp)[0]
    torch.testing.assert_close(gradient(data, presets["minirl"]), expected, rtol=1e-12, atol=1e-15)


def test_on_policy_minirl_is_reinforce_with_a_mean_baseline() -> None:
    data = batch()
    same = data["logprobs"].detach()
    data |= {"old_logprobs": same, "rollout_logprobs": same}
    expected = -data["mask"] * data["advantages"] / len(LENGTHS)
    torch.testing.assert_close(gradient(data, presets["minirl"]), expected, rtol=1e-14, atol=0)
    for name in ("reinforce", "minirl-no-is", "minirl-no-clip"):
        assert torch.equal(gradient(data, presets["minirl"]), gradient(data, presets[name]))


@pytest.mark.parametrize("name", list(presets))
@pytest.mark.parametrize("calls", [1, 3, 7])
def test_same_gradient_for_any_split(name: str, calls: int) -> None:
    data, config = batch(3), presets[name]
    whole = gradient(data, config)
    index = (1000 - data["seq_ids"]) // 7
    owner = torch.tensor([0, 2, 1, 0, 0, 4, 5, 6, 3, 0, 2, 2])[index] % calls  # uneven, groups split over calls
    full = denominators(torch.tensor(LENGTHS), torch.tensor(GROUPS), config)[index]
    scalar = {"tokens": sum(LENGTHS), "group_tokens": 4}.get(config.denominator, len(LENGTHS))
    for denominator in (full, scalar, torch.tensor(float(scalar))) if config.denominator != "group_tokens" else (full,):
        total = torch.zeros_like(whole)
        for call in range(calls):
            where = owner == call
            part = {key: value.detach()[where] for key, value in data.items()}
            given = denominator[where] if denominator is full else denominator
            total[where] = gradient(part, config, denominator=given)
        torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-16)


def test_padding_is_no_response() -> None:
    data = batch()
    for name in ("minirl", "grpo", "cispo"):
        padded = {key: torch.cat([value.detach(), value.detach()[:5]]) for key, value in data.items()}
        padded["seq_ids"][-5:] = -1
        padded["mask"][-5:] = 0
        assert torch.equal(gradient(padded, presets[name])[:-5], gradient(data, presets[name]))


@pytest.mark.parametrize("name", list(presets))
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_positions_may_hold_anything(name: str, garbage: float) -> None:
    data = batch()
    clean = gradient(data, presets[name])
    where = data["mask"] == 0
    for key in ("logprobs", "old_logprobs", "rollout_logprobs", "advantages"):
        data[key] = data[key].detach().masked_fill(where, garbage)
    entropy = torch.full_like(data["mask"], garbage).masked_fill(~where, 0.5)
    assert torch.equal(gradient(data, presets[name], entropy=entropy), clean)
    loss, metrics = policy_loss(
        *(data[key] for key in ARGUMENTS), presets[name], group_ids=data["group_ids"], entropy=entropy
    )
    assert loss.isfinite() and all(math.isfinite(value) for value in finish(metrics).values())


def test_a_one_token_response_has_a_gradient() -> None:
    one = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    for name, config in presets.items():
        loss, _ = policy_loss(
            one,
            one.detach(),
            one.detach(),
            torch.ones(1),
            torch.ones(1),
            torch.zeros(1).long(),
            config,
            group_ids=torch.zeros(1),
        )
        assert torch.autograd.grad(loss, one)[0].abs() > 0, name


def test_a_call_without_response_tokens_is_zero_and_differentiable() -> None:
    data = {key: value.detach()[:2] for key, value in batch().items()}
    assert torch.equal(gradient(data, presets["minirl"]), torch.zeros(2, dtype=torch.float64))


def test_huge_ratios_stay_finite() -> None:
    data = batch(dtype=torch.float32)
    data["old_logprobs"] = data["old_logprobs"] - 200
    data["rollout_logprobs"] = data["rollout_logprobs"] - 200
    for name, config in presets.items():
        assert gradient(data, config).isfinite().all(), name


CORRECTIONS = ["token_truncation", "token_mask", "sequence_truncation", "sequence_mask", "geometric_rejection"]


@pytest.mark.parametrize("name", [name for name, config in presets.items() if config.weight != "is"])
@pytest.mark.parametrize("kind", CORRECTIONS)
def test_corrections_multiply_the_gradient_of_every_preset_whose_weight_does_not_hold_mu(kind: str, name: str) -> None:
    data = batch(5, 0.8)
    plain = gradient(data, presets[name])
    corrected = gradient(
        data, resolve_objective({"preset": name, "correction": kind, "correction_low": 0.4, "correction_high": 1.8})
    )
    expected = torch.zeros_like(plain)
    for seq in data["seq_ids"].unique():
        tokens = [t for t in range(len(plain)) if data["seq_ids"][t] == seq and data["mask"][t]]
        logs = [float(data["old_logprobs"][t] - data["rollout_logprobs"][t]) for t in tokens]
        for t, log in zip(tokens, logs):
            rho = math.exp(
                log if kind.startswith("token") else sum(logs) / (len(logs) if kind.startswith("geometric") else 1)
            )
            factor = min(rho, 1.8) if kind.endswith("truncation") else rho * (0.4 <= rho <= 1.8)
            expected[t] = plain[t] * (float(factor > 0) if kind.startswith("geometric") else factor)
    torch.testing.assert_close(corrected, expected, rtol=1e-10, atol=1e-15)
    assert 0 < (corrected != plain).sum()


def test_kl_and_entropy_terms() -> None:
    data = batch()
    config = resolve_objective({"preset": "minirl", "kl_coef": 0.3, "entropy_coef": 0.2})
    logp, entropy = data["logprobs"], torch.rand_like(data["mask"]).requires_grad_()
    ref = data["rollout_logprobs"]
    loss, _ = policy_loss(*(data[key] for key in ARGUMENTS), config, ref_logprobs=ref, entropy=entropy)
    grad, grad_entropy = torch.autograd.grad(loss, [logp, entropy])
    kl = data["mask"] * 0.3 * (1 - (ref - logp.detach()).exp()) / len(LENGTHS)
    torch.testing.assert_close(grad, gradient(data, presets["minirl"]) + kl)
    torch.testing.assert_close(grad_entropy, -0.2 * data["mask"] / len(LENGTHS))
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss(*(data[key] for key in ARGUMENTS), config, entropy=entropy)


def test_float64_stays_float64() -> None:
    """Where the weight is constant the loss is an antiderivative, which
    finite differences in float64 can check to 1e-6.
    """
    data = batch(9, 0.3)
    config = resolve_objective({"preset": "reinforce", "kl_coef": 0.3, "entropy_coef": 0.2})
    entropy = torch.rand_like(data["mask"]).requires_grad_()
    rest = [data[key].detach() for key in ARGUMENTS[1:]]

    def loss(logp: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return policy_loss(logp, *rest, config, ref_logprobs=data["old_logprobs"], entropy=entropy)[0]

    assert torch.autograd.gradcheck(loss, (data["logprobs"], entropy), eps=1e-6, atol=1e-9)
    single = denominators(torch.tensor(LENGTHS), torch.tensor(GROUPS), config)[(1000 - data["seq_ids"]) // 7].float()
    for name in presets:
        for denominator in (None, single, 3.0):
            out, _ = policy_loss(
                data["logprobs"], *rest, presets[name], group_ids=data["group_ids"], denominator=denominator
            )
            assert (
                out.dtype == torch.float64 and torch.autograd.grad(out, data["logprobs"])[0].dtype == torch.float64
            ), name


def test_value_loss_is_ppo_clipped() -> None:
    values = torch.tensor([0.0, 1.0, 3.0, math.nan], requires_grad=True)
    old, returns = torch.tensor([0.0, 0.5, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss = value_loss(values, old, returns, torch.tensor([1, 1, 1, 0]), clip=0.2)
    assert loss.item() == pytest.approx(0.5 * (1.0 + 0.09 + 4.0) / 3)
    assert torch.autograd.grad(loss, values)[0].tolist() == pytest.approx([-1 / 3, 0, 2 / 3, 0])


def test_metrics_do_not_depend_on_the_split() -> None:
    data = batch(7)
    entropy = torch.rand_like(data["mask"])
    args = [data[key] for key in ARGUMENTS]
    whole = finish(policy_loss(*args, presets["minirl"], entropy=entropy)[1])
    merged: dict[str, torch.Tensor] = {}
    half = data["seq_ids"] > 960
    for where in (half, ~half):
        merged = merge(
            merged,
            policy_loss(*(x[where] for x in args), presets["minirl"], entropy=entropy[where], denominator=1.0)[1],
        )
    assert finish(merged) == pytest.approx(whole, rel=1e-12)
    assert whole["loss/value"] == pytest.approx(policy_loss(*args, presets["minirl"])[0].item())
    assert set(whole) == {
        "loss/value", "loss/weight_mean", "loss/weight_truncated_frac", "staleness/kl_k3", "staleness/ratio_max",
        "staleness/clip_frac_pos", "staleness/clip_frac_neg", "policy/entropy",
    }  # fmt: skip
