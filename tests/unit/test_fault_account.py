"""The arithmetic of tools/fault_run.py: what a run has lost, and what it has learnt from twice."""

from __future__ import annotations

from collections import Counter

import pytest

from tools.fault_run import GROUP, PROMPTS, account

STEPS = list(range(1, 53))
DRAWN = [str(number) for number in range(212)]
WAITING = Counter(DRAWN[-4:])


def learnt(prompts: list[str]) -> Counter[str]:
    return Counter(dict.fromkeys(prompts, GROUP))


@pytest.mark.parametrize("share", [90, 104, 120])
def test_rank_0_of_two_replicas_has_any_number_of_groups(share: int) -> None:
    """One step off, groups are assigned to whoever has least to do: what rank 0 had not had was told of as lost."""
    assert account(STEPS, DRAWN, WAITING, learnt(DRAWN[:share]), 0) == (0, 0)


def test_what_is_missing_or_comes_twice_is_told_of() -> None:
    whole, least = learnt(DRAWN[:208]), len(STEPS) * PROMPTS
    assert account(STEPS, DRAWN, WAITING, whole, least) == (0, 0)
    assert account(STEPS, DRAWN, WAITING, learnt(DRAWN[:207]), least) == (1, 0)
    assert account(STEPS, DRAWN, WAITING, whole - Counter(DRAWN[:1]), least) == (1, 0), "a group in part"
    assert account(STEPS, DRAWN, WAITING, whole | learnt(["never drawn"]), least) == (1, 0)
    assert account(STEPS, [*DRAWN, "drawn, and gone"], WAITING, whole, least) == (1, 0)
    assert account([*STEPS[:50], 52, 53], DRAWN, WAITING, whole, least) == (1, 0), "step 51"
    assert account(STEPS, DRAWN, WAITING, whole + Counter(DRAWN[:1]), least) == (0, 1)
    assert account(STEPS, DRAWN, WAITING, whole | learnt(DRAWN[208:209]), least) == (0, 1), "it waits all the same"
    assert account([*STEPS, 52], [*DRAWN, *"abcd"], WAITING, whole, least) == (0, 1), "a step"
