"""Rectangles against sets of indices, and buckets against their rule."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from megarl.weights.buckets import fill_buckets
from megarl.weights.rect import Rect

SHAPE = (4, 5, 3)
NUMBERS = torch.arange(60).view(SHAPE)


def random_rect(rng: random.Random) -> Rect:
    ends = [sorted(rng.sample(range(n + 1), 2)) for n in SHAPE]
    return Rect(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


def elements(rect: Rect | None) -> set[int]:
    return set() if rect is None else set(NUMBERS[rect.slices].flatten().tolist())


@pytest.mark.parametrize("seed", range(50))
def test_rectangles_are_sets_of_elements(seed: int) -> None:
    rng = random.Random(seed)
    a, b = random_rect(rng), random_rect(rng)
    both = a.intersect(b)
    assert elements(both) == elements(a) & elements(b) and both == b.intersect(a)
    assert a.numel == len(elements(a)) and elements(Rect.whole(SHAPE)) == set(range(60))
    around = Rect.around([a, b])
    assert elements(a) | elements(b) <= elements(around)
    assert around.offset == tuple(map(min, a.offset, b.offset)) and around.end == tuple(map(max, a.end, b.end))
    for inner in (a, b):
        assert torch.equal(NUMBERS[around.slices][inner.within(around).slices], NUMBERS[inner.slices])
        assert inner.within(around).moved(around.offset) == inner
    first, count = rng.randrange(a.size[0]), 1
    assert torch.equal(NUMBERS[a.rows(first, count).slices], NUMBERS[a.slices][first : first + count])


def test_a_scalar_is_one_element() -> None:
    scalar = Rect.whole(())
    assert scalar.numel == 1 and scalar.intersect(scalar) == scalar and str(scalar) == "[]"
    assert str(Rect((0, 3), (2, 4))) == "[0:2, 3:7]"


@pytest.mark.parametrize("limit", [1, 7, 10, 100])
def test_buckets_keep_the_order_and_the_limit(limit: int) -> None:
    sizes = [random.Random(limit).randrange(12) for _ in range(30)]
    buckets = list(fill_buckets(enumerate(sizes), limit))
    assert list(itertools.chain(*buckets)) == list(range(30))
    totals = [sum(sizes[item] for item in bucket) for bucket in buckets]
    assert all(total <= limit or len(bucket) == 1 for total, bucket in zip(totals, buckets, strict=True))
    following = [sizes[bucket[0]] for bucket in buckets[1:]]
    assert all(total + size > limit for total, size in zip(totals, following, strict=False)), "one that was cut early"


def test_a_limit_holds_for_each_rank() -> None:
    sizes = [np.array([4, 0]), np.array([0, 4]), np.array([2, 1])]
    assert list(fill_buckets(zip("abc", sizes, strict=True), 5)) == [["a", "b"], ["c"]]
    assert list(fill_buckets([], 5)) == []
