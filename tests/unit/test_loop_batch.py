"""What becomes of a batch between servers and trainer: bad samples, equal groups, truncated and empty responses."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megarl.commands.compare import compare  # noqa: E402
from megarl.config import load_config  # noqa: E402
from megarl.data import Prompt  # noqa: E402
from megarl.engine import step as step_module  # noqa: E402
from megarl.errors import UserError  # noqa: E402
from megarl.loop import reduce  # noqa: E402
from megarl.loop.dull import DullSteps  # noqa: E402
from megarl.loop.evaluate import evaluate  # noqa: E402
from megarl.loop.guard import WARM_UP  # noqa: E402
from megarl.loop.learn import Learner  # noqa: E402
from megarl.reward.pool import Score  # noqa: E402
from tests.unit.scripted_loop import ALL, MIXED, NONE, build, collect, groups_of, model_folder  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from model_folder(tmp_path_factory)


def test_equal_groups_are_kept_dropped_or_replaced(folder: Path) -> None:
    _, kept, _ = build(folder, [MIXED, ALL, NONE, MIXED], "batch.minibatches=2")
    batch, _ = collect(kept)
    assert groups_of(batch) == [[0, 1], [2, 3]] and batch.metrics["batch/equal_groups"] == 2
    _, dropping, _ = build(folder, [MIXED, ALL, NONE, MIXED], "batch.minibatches=2", "batch.equal_groups=drop")
    batch, drawn = collect(dropping)
    assert groups_of(batch) == [[0], [3]] and len(drawn) == 4 and batch.metrics["batch/groups"] == 2
    assert batch.metrics["reward/mean"] == 0.5  # of everything that was sampled
    refill = [MIXED, ALL, NONE, MIXED, ALL, MIXED, MIXED]
    _, refilling, _ = build(folder, refill, "batch.minibatches=2", "batch.equal_groups=refill", "batch.max_refills=2")
    batch, drawn = collect(refilling)
    assert (
        groups_of(batch) == [[0, 3], [5, 6]]
        and drawn == list(range(1, 8))
        and batch.metrics["batch/refilled_groups"] == 3
    )
    _, exhausted, _ = build(
        folder, [MIXED, ALL, NONE, NONE, ALL, ALL, ALL], "batch.minibatches=4", "batch.equal_groups=refill"
    )
    exhausted.config.batch.max_refills = 1
    batch, drawn = collect(exhausted)
    assert groups_of(batch) == [[0]] and len(drawn) == 7  # fewer groups than mini-batches: one each


def test_a_batch_that_teaches_nothing_is_skipped_and_still_has_its_row(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, loop, _ = build(folder, [ALL, NONE, ALL, ALL])
    before = [tensor.detach().clone() for _, tensor in engine.model.params()]
    batch, _ = collect(loop)
    learned = Learner(loop.config, engine).learn(batch, 0)
    assert learned.optimizer_steps == 0 and learned.metrics["batch/skipped_updates"] == 0
    assert batch.metrics["reward/mean"] == 0.75
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, engine.model.params()))
    assert "step 1: nothing to learn, in each of 4 groups all rewards are equal; no update" in capsys.readouterr().out
    _, with_kl, _ = build(folder, [ALL, NONE, ALL, ALL], "objective.entropy_coef=0.1")
    assert groups_of(collect(with_kl)[0]) == [[0, 1, 2, 3]]  # the entropy bonus does teach
    _, dropped, _ = build(folder, [ALL, NONE, ALL, ALL], "objective.entropy_coef=0.1", "batch.equal_groups=drop")
    assert groups_of(collect(dropped)[0]) == []
    assert "step 1: nothing to learn, in each of 4 groups all rewards are equal; no update" in capsys.readouterr().out


def test_fault_10_a_batch_without_a_token_to_train_on_is_said_and_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, keys = ["123456", "123453", "1234567", "1234563"], ("batch.mask_truncated=true", "batch.minibatches=2")
    for objective in ("minirl", "dapo", "cispo", "grpo"):
        engine, loop, _ = build(folder, [cut] * 4, f"objective={objective}", *keys)
        batch, _ = collect(loop)
        assert batch.minibatches == [] and batch.metrics["batch/nothing_to_learn"] == 2
        learned = Learner(loop.config, engine).learn(batch, 0)
        assert learned.optimizer_steps == 0 and learned.metrics["batch/skipped_updates"] == 0
        assert all(np.isfinite(value).all() for value in {**batch.metrics, **learned.metrics}.values())
        said = "nothing to learn, no response has a token to train on, 16 of 16 were truncated and batch.mask_truncated"
        assert f"step 1: {said}; no update" in capsys.readouterr().out
        engine, loop, _ = build(folder, [cut, cut, MIXED, MIXED], f"objective={objective}", *keys)
        batch, _ = collect(loop)
        assert groups_of(batch) == [[2, 3]] and batch.metrics["batch/nothing_to_learn"] == 1
        learned = Learner(loop.config, engine).learn(batch, 0)
        assert learned.optimizer_steps == 1 and learned.metrics["optim/grad_norm"] > 0
        assert all(np.isfinite(value).all() for value in {**batch.metrics, **learned.metrics}.values())


@pytest.mark.parametrize(
    ("keys", "steps", "asked"),
    [
        (["batch.minibatches=1"], 1, [True]),
        (["batch.minibatches=2"], 2, [True, False]),
        (["objective=ppo", "critic.warmup_steps=1"], 0, [True]),  # the critic's
    ],
)
def test_no_step_is_made_before_the_servers_canary_is_compared(
    folder: Path, keys: list[str], steps: int, asked: list[bool]
) -> None:
    """With rollouts in flight it comes while the gradients are computed (megarl/train.py)."""
    engine, loop, _ = build(folder, [MIXED] * 4, *keys)
    learner = Learner(loop.config, engine)
    engines = [engine, *([learner.critic] if learner.critic else [])]
    trained = [tensor for each in engines for tensor in each.model.bare[0].parameters()]
    before = [tensor.detach().clone() for tensor in trained]

    def same() -> bool:
        return all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))

    def differs() -> None:
        raise UserError("the canary differs")

    batch, _ = collect(loop)
    with pytest.raises(UserError, match="the canary differs"):
        learner.learn(batch, 0, differs)
    assert same()
    found: list[bool] = []
    assert learner.learn(batch, 0, lambda: found.append(same())).optimizer_steps == steps
    assert found == asked and not same()


def test_the_wait_for_the_canary_is_no_part_of_the_update(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, loop, _ = build(folder, [MIXED] * 4)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(reduce.time, "perf_counter", lambda: clock.now)

    def wait() -> None:
        clock.now += 7.0

    values = Learner(loop.config, engine).learn(collect(loop)[0], 0, wait).metrics
    assert values["time/canary_s"] == 7.0 and values["time/update_s"] == 0.0


def test_a_wrong_server_is_named_before_what_it_has_spoilt_ends_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, loop, _ = build(folder, [MIXED] * 4)
    monkeypatch.setattr(engine, "finite_gradients", lambda: False)

    def differs() -> None:
        raise UserError("the canary differs")

    with pytest.raises(UserError, match="the canary differs"):
        Learner(loop.config, engine).learn(collect(loop)[0], 0, differs)


def test_no_pass_keeps_routes_that_no_recompute_will_ask_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3.2 GB a rank in the 235B example."""
    left: list[int] = []
    original = step_module.replay_schedule

    @contextmanager
    def counted(*given: Any) -> Iterator[Any]:
        with original(*given) as replay:
            yield replay
            left.append(sum(len(hook.used) for hooks in replay._hooks for hook in hooks))

    monkeypatch.setattr(step_module, "replay_schedule", counted)
    engine, loop, _ = build(folder, [MIXED] * 4, "batch.minibatches=2", "replay.metrics=true", "replay.mode=R2")
    assert Learner(loop.config, engine).learn(collect(loop)[0], 0).optimizer_steps == 2
    assert left == [0, 0, 0]  # the pi_old pass and two updates


@pytest.mark.parametrize(("key", "checks"), [("batch.minibatches=1", 1), ("batch.minibatches=2", 3)])
def test_what_the_guard_has_measured_is_not_measured_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, checks: int
) -> None:
    """And ranks agree that numbers are sound only where there are new ones."""
    calls = Counter[str]()

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: calls.update([name]) or real(*given))

    found = []
    for factor in (0, 50):
        engine, loop, _ = build(folder, [MIXED] * 4, key, "replay.metrics=true", f"train.mismatch_guard={factor}")
        batch, _ = collect(loop)
        calls.clear()
        with monkeypatch.context():
            counted(Learner, "_mismatch")
            counted(Learner, "_sound")
            found.append(Learner(loop.config, engine).learn(batch, 0).metrics)
            monkeypatch.undo()
        assert calls == {"_mismatch": 1, "_sound": checks}
    of_batch = [{name: value for name, value in row.items() if not name.startswith("time/")} for row in found]
    assert of_batch[0] == of_batch[1] and "mismatch/kl_k3" in of_batch[0] and "routing/agree_old_current" in of_batch[0]


def test_fault_16_failed_rewards_are_left_out_and_counted_or_stop_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in an evaluation; no NaN in either row."""
    prompts = [Prompt([4], "3", "1", line) for line in (1, 2, 3, 4)]
    for mode, bad in (("skip", {1, 4, 5, 6, 7}), ("skip", set(range(16))), ("stop", {5})):
        keys = (f"train.on_bad_batch={mode}", "eval.prompts=valid.jsonl", "data.pass_threshold=0.6", "eval.samples=4")
        _, loop, client = build(folder, [MIXED] * 8, *keys)
        scores = [Score(np.nan, "fails") if i in bad else Score(0.25 * (i % 4)) for i in range(16)]
        monkeypatch.setattr(loop.scorer, "score", lambda rollouts, scores=scores: scores)
        if mode == "stop":
            with pytest.raises(UserError, match="step 1: response 1 to the prompt on line 2 of train.jsonl: fails"):
                collect(loop)
            with pytest.raises(UserError, match="to the prompt on line 2 of valid.jsonl: fails; mend it"):
                evaluate(loop.sampler, loop.scorer, prompts, loop.config)
            continue
        found = evaluate(loop.sampler, loop.scorer, prompts, loop.config)
        batch, _ = collect(loop)
        assert found["eval/bad_samples"] == batch.metrics["batch/bad_samples"] == len(bad) and found["eval/k"] == 4
        if len(bad) == 16:
            assert not [
                key for key in {**found, **batch.metrics} if key.startswith(("reward/", "eval/mean", "eval/pa"))
            ]
            continue
        assert found["eval/mean_at_k"] == batch.metrics["reward/mean"] == pytest.approx((1.25 + 1.5 + 1.5) / 11)
        assert found["eval/pass_at_k"] == batch.metrics["reward/pass_at_g"] == 1.0  # of the prompts that have a reward
        assert np.isfinite(list(found.values())).all()


@pytest.mark.parametrize("bad", [{5}, {4, 5, 6, 7}, set(range(16))])
def test_compare_leaves_out_only_the_responses_that_are_bad(
    folder: Path, bad: set[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, loop, _ = build(folder, [MIXED] * 4, "train.on_bad_batch=skip")
    scores = [Score(np.nan, "fails") if i in bad else Score(1.0) for i in range(16)]
    monkeypatch.setattr(loop.scorer, "score", lambda rollouts: scores)
    batch, _ = collect(loop, to_learn=False)
    assert f"step 1: without them, {len(bad)} samples are bad" in capsys.readouterr().out
    if len(bad) == 16:
        with pytest.raises(UserError, match="^no response is left to compare: "):
            compare(engine, batch, captured=False)
        return
    packs = [pack for part in batch.minibatches for pack in part]
    assert sorted(i for pack in packs for i in pack.responses) == [i for i in range(16) if i not in bad]
    assert len(compare(engine, batch, captured=False)) == 16 - len(bad)


def test_compare_needs_no_answers(folder: Path) -> None:
    engine, loop, _ = build(folder, [MIXED, ALL, NONE, MIXED])
    batch, _ = collect(loop, to_learn=False, unanswered=(2, 3))
    assert len(compare(engine, batch, captured=False)) == 16
    assert batch.metrics["reward/mean"] == 0.5 and batch.metrics["batch/bad_samples"] == 0


def test_compare_leaves_out_responses_without_a_token_to_compare(folder: Path) -> None:
    engine, loop, _ = build(folder, [["", "3", "1234567", "4"], *[MIXED] * 3], "batch.mask_truncated=true")
    batch, _ = collect(loop, to_learn=False)
    found = compare(engine, batch, captured=False)
    assert len(found) == 14 and all(len(response.rollout) == len(response.tokens) - 3 for response in found)


def test_fault_19_a_response_passes_from_the_threshold_on(folder: Path) -> None:
    for threshold, passed in ((0.5, 0.75), (1.0, 0.75), (1.5, 0.0), (0.0, 1.0)):
        _, loop, _ = build(folder, [MIXED, ALL, NONE, MIXED], f"data.pass_threshold={threshold}")
        assert collect(loop)[0].metrics["reward/pass_at_g"] == passed


def test_fault_23_steps_without_a_difference_in_reward_end_the_run(folder: Path) -> None:
    dull = DullSteps(load_config(None, ["train.stop_on_dull_steps=3", "run.dir=runs/x"]))
    zero: dict[str, Any] = {"reward/std": 0.0, "reward/mean": 0.0}
    assert [dull.add(i, zero) for i in (1, 2)] == ["", ""]
    assert dull.add(3, {"reward/std": 0.1, "reward/mean": 0.1}) == "" and dull.add(4, {}) == ""
    assert [dull.add(i, zero) for i in (5, 6)] == ["", ""]
    assert dull.add(7, zero) == (
        "all rewards of the last 3 steps, to step 7, were 0: nothing is left to learn from; read runs/x/rollouts/, "
        "mend data.reward or the prompts, or set train.stop_on_dull_steps=0 to go on"
    )
    assert "give harder prompts" in dull.add(8, {"reward/std": 0.0, "reward/mean": 1.0})
    for key in ("train.stop_on_dull_steps=0", "data.overlong_buffer=4"):
        dull = DullSteps(load_config(None, [key]))
        assert not any(dull.add(i, zero) for i in range(1, 60))


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_nan_log_probability_is_named(folder: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, loop, client = build(folder, [MIXED] * 4, f"train.on_bad_batch={mode}")
    client.nan = (2, 1)
    named = (
        "step 1: response 1 to the prompt on line 3 of train.jsonl: the rollout's log-probability of its token 2 is nan"
    )
    if mode == "stop":
        with pytest.raises(UserError, match=named):
            collect(loop)
    else:
        batch, _ = collect(loop)
        assert batch.minibatches == [] and batch.metrics["batch/bad_samples"] == 1
        assert named.removeprefix("step 1: ") in capsys.readouterr().out


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_a_gradient_whose_square_overflows_is_no_update(
    folder: Path, clip_grad: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("objective=grpo", "batch.minibatches=2", "train.on_bad_batch=skip", f"train.clip_grad={clip_grad}")
    engine, loop, _ = build(folder, [MIXED] * 4, *keys)
    batch, _ = collect(loop)
    score = engine.logprobs
    monkeypatch.setattr(  # r = e^50, and no clip where A < 0
        engine, "logprobs", lambda *given: [s._replace(logprobs=s.logprobs - 50) for s in score(*given)]
    )
    learned = Learner(loop.config, engine).learn(batch, 0)
    assert learned.optimizer_steps == 0 and learned.metrics["batch/skipped_updates"] == 2
    assert "the norm of an update's gradient is not finite" in capsys.readouterr().out


def test_truncated_responses_leave_the_loss_and_empty_ones_count(folder: Path) -> None:
    engine, loop, _ = build(
        folder, [["", "3", "1234567", "3"], *[MIXED] * 3], "batch.mask_truncated=true", "objective=dapo"
    )
    batch, _ = collect(loop)
    (packs,) = batch.minibatches
    trained = sum(float(pack.mask.sum()) for pack in packs)
    assert batch.metrics["response/empty"] == 1 and batch.metrics["response/tokens"] == trained + 7
    assert all(
        float(pack.rollout.denominators[pack.mask.bool()][0]) == trained for pack in packs
    )  # dapo divides by the tokens of the loss
    learned = Learner(loop.config, engine).learn(batch, 0)
    assert learned.optimizer_steps == 1 and learned.metrics["optim/grad_norm"] > 0


def test_the_overlong_penalty_reaches_the_advantages_and_not_the_reported_reward(folder: Path) -> None:
    keys = ("data.overlong_buffer=4", "data.overlong_penalty=0.5", "rollout.max_new_tokens=6", "objective=minirl")
    _, loop, _ = build(folder, [["3", "1113", "111113", "3"], *[ALL] * 3], *keys)
    batch, _ = collect(loop)
    assert batch.metrics["reward/mean"] == 1.0
    (pack,) = batch.minibatches[0]
    found = {n: pack.rollout.advantages[start].item() for n, start in zip(pack.responses, pack.starts) if n < 4}
    shaped = np.array([1.0, 0.75, 0.5, 1.0])  # 0, 4 - 2 = 2 of 4, 4 of 4 tokens into the buffer
    assert [found[n] for n in range(4)] == pytest.approx((shaped - shaped.mean()).tolist())


@pytest.mark.parametrize(("minibatches", "objective"), [(1, "grpo"), (2, "grpo"), (1, "ppo")])
def test_a_batch_sampled_from_other_weights_is_not_trained_on(
    folder: Path, minibatches: int, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """mu in line for the first batches, then far off: with a pi_old pass of its own and without; nor by a critic."""
    answers = [MIXED] * 4 * (WARM_UP + 2)
    keys = (f"batch.minibatches={minibatches}", f"objective={objective}", "train.lr=1e-9")
    engine, loop, client = build(folder, answers, *keys)
    learner = Learner(loop.config, engine)
    engines = [engine, *([learner.critic] if learner.critic else [])]
    for _ in range(WARM_UP):
        assert learner.learn(collect(loop)[0], 0).optimizer_steps == minibatches
    client.mu = -30.0
    before = [tensor.detach().clone() for each in engines for tensor in each.model.bare[0].parameters()]
    learned = learner.learn(collect(loop)[0], WARM_UP)
    assert learned.optimizer_steps == 0 and learned.metrics["batch/guarded"] == 1
    assert learned.guarded.startswith("mismatch/kl_k3 is ") and "train.mismatch_guard" in capsys.readouterr().out
    after = [tensor for each in engines for tensor in each.model.bare[0].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    client.mu = -0.5
    assert learner.learn(collect(loop)[0], WARM_UP + 1).optimizer_steps == minibatches


@pytest.mark.parametrize("objective", ["minirl", "cispo"])
def test_the_reported_loss_does_not_depend_on_the_packs(folder: Path, objective: str) -> None:
    losses = []
    for tokens in (4096, 10):  # all in one pack, or the responses of a group in several
        keys = (f"objective={objective}", f"engine.micro_batch_tokens={tokens}", "batch.minibatches=2")
        engine, loop, _ = build(folder, [["", "3", "1234567", "4"], MIXED, ["13", "4", "124", "23"], MIXED], *keys)
        batch, _ = collect(loop)
        losses.append(Learner(loop.config, engine).learn(batch, 0).metrics["loss/value"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
