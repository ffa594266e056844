"""A batch whose mismatch is out of line is not trained on."""

from __future__ import annotations

import json
import math

import pytest

from megarl.loop.guard import MOST, WARM_UP, MismatchGuard


def warmed(k3: float, agreement: float | None = 1.0, factor: float = 50.0) -> MismatchGuard:
    guard = MismatchGuard(factor)
    for n in range(WARM_UP):
        assert guard.judge(k3 * (1 + n / 10), agreement) == ""
    return guard


def test_who_resumes_judges_as_it_would_have_done() -> None:
    guard, resumed = warmed(1e-5), MismatchGuard(50.0)
    assert guard.judge(0.1, 1.0)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for k3 in (1e-5, 6e-4, 1e-5, *[0.1] * MOST):
        assert resumed.judge(k3, 1.0) == guard.judge(k3, 1.0)
    assert resumed.gives_up(7) == guard.gives_up(7) != ""


def test_a_run_that_gave_up_may_go_on() -> None:
    """Its message says how: with the guard at 0, or another factor, or other engines."""
    guard = warmed(1e-5)
    for _ in range(MOST):
        assert guard.judge(0.1, 1.0)
    assert guard.gives_up(7)
    for resumed in (MismatchGuard(0.0), MismatchGuard(50.0)):
        resumed.load_state_dict(guard.state_dict())
        assert not resumed.gives_up(8), "a step without an update judges nothing"
    other = MismatchGuard(50.0, of="bfloat16")
    other.load_state_dict(guard.state_dict())
    assert not other.judge(0.1, 1.0), "between other engines the band is not known"


@pytest.mark.parametrize(
    ("usual", "now", "word"),
    [
        ((3e-14, 1.0), (0.05, 0.91), "mismatch/kl_k3 is 0.05"),  # other weights in a float32 run
        ((3e-14, 1.0), (1e-9, 0.91), "the share of routes that differ is 0.09"),
        ((3e-3, 0.97), (math.nan, 0.97), "mismatch/kl_k3 is nan"),
        ((3e-3, 0.97), (0.5, 0.9), "mismatch/kl_k3 is 0.5"),
        ((3e-3, 0.97), (0.05, 0.9), ""),  # a hard batch in bfloat16
        ((3e-14, 1.0), (1e-5, 0.999), ""),  # noise
    ],
)
def test_what_leaves_its_band_is_named(usual: tuple[float, float], now: tuple[float, float], word: str) -> None:
    found = warmed(*usual).judge(*now)
    assert found.startswith(word) and bool(found) == bool(word)


def test_a_batch_out_of_line_does_not_widen_the_band() -> None:
    guard = warmed(1e-12)
    assert all(guard.judge(0.1, 1.0) for _ in range(30))


def test_a_jump_that_lasts_ends_the_run_in_one_line() -> None:
    guard = warmed(1e-12)
    for _ in range(2):
        for _ in range(MOST - 1):
            assert guard.judge(0.1, 1.0) and not guard.gives_up(7)
        assert guard.judge(1e-12, 1.0) == "" == guard.gives_up(7)
    for _ in range(MOST):
        guard.judge(0.1, 1.0)
    why = f"the last {MOST} batches, to step 7, were not trained on (train.mismatch_guard 50): mismatch/kl_k3 is 0.1, "
    assert guard.gives_up(7).startswith(why)


def test_what_the_policy_moved_between_sampling_and_update_is_no_fault() -> None:
    """k3 of one run, one step off: a settled policy that moves again is trained on, other weights are not."""
    settled = (3.5e-7, 2.3e-6, 1.8e-6, 2.2e-6, 7.3e-6, 5.3e-6, 4.1e-6)
    guard, in_lock_step = MismatchGuard(50.0, lagged=True), MismatchGuard(50.0)
    for k3 in settled:
        assert guard.judge(k3, 0.995) == in_lock_step.judge(k3, 0.995) == ""
    assert in_lock_step.judge(8.7e-4, 0.992)
    assert [guard.judge(k3, 0.992) for k3 in (8.7e-4, 1.3e-3, 1.7e-3)] == [""] * 3
    assert guard.judge(0.06, 0.99).startswith("mismatch/kl_k3 is 0.06, above 0.05")


def test_the_first_batches_and_a_factor_of_zero_let_everything_pass() -> None:
    assert MismatchGuard(50.0).judge(9.0, 0.1) == ""
    assert warmed(1e-12, factor=0.0).judge(9.0, 0.1) == ""
    assert warmed(1e-12, None).judge(None, None) == ""
