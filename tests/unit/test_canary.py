"""The limits of a weight sync's canary: what is wrong is seen in bfloat16 too, and what is well is not refused.

The trainer is a real bf16 model, the rollout the same weights in float32, along the same routes: between them lies the
rounding of one engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from tools.bench.gpu.common import engine_of
from tools.tiny_model import tiny_config

# isort: split
from megarl.config import CANARY_TOKENS
from megarl.engine.batch import Pack, make_packs
from megarl.engine.build import Engine, route_shape
from megarl.engine.exchange import attach_routes
from megarl.engine.parallel import destroy_parallel
from megarl.engine.step import Routes, TokenScores
from megarl.errors import UserError
from megarl.loop import own_score
from megarl.loop.canary import FACTOR, CanaryLimits, Spread, spread_of
from megarl.loop.own_score import OwnScore
from megarl.rollout.sync_leader import Canary

BF16 = torch.bfloat16
GOOD = Spread(0.003, 0.012, 0.015)


class Engines:
    def __init__(self) -> None:
        hf = tiny_config(dtype="float32").to_dict()
        self.trainer, self.rollout = (
            engine_of(hf, [f"engine.dtype={dtype}"], train=False)[1] for dtype in ("bfloat16", "float32")
        )
        self.tokens = OwnScore(self.rollout, None, 1).tokens
        self.generator = torch.Generator().manual_seed(1)
        self.sync()

    def sync(self, change: float = 0.0) -> None:
        """Other weights on both sides, each by a share `change` of itself."""
        pairs = zip(self.trainer.model.params(), self.rollout.model.params(), strict=True)
        for (_, ours), (_, theirs) in pairs:
            noise = torch.randn(theirs.shape, generator=self.generator)
            ours.data.copy_(theirs.data * (1 + change * noise))
            theirs.data.copy_(ours.data)

    def spread(self) -> Spread:
        own = OwnScore(self.trainer, route_shape(self.trainer.model), 4096)
        own.take()
        (spread,) = own.spreads([("http://one", score_of(self.rollout, self.tokens))])
        return spread

    def busiest_expert(self, layer: int) -> int:
        routes = score_of(self.rollout, self.tokens).routes
        assert routes is not None
        return int(np.bincount(routes[:, layer].flatten()).argmax())

    @contextmanager
    def without(self, layer: int, expert: int | None = None) -> Iterator[None]:
        """The rollout computes without that layer, or without that expert of it."""
        part = f"decoder.layers.{layer}." + (f"mlp.experts.local_experts.{expert}." if expert is not None else "")
        out = [
            tensor
            for param, tensor in self.rollout.model.params()
            if param.name.startswith(part) and ("linear_fc2" in param.name or "linear_proj" in param.name)
        ]
        assert out, part
        kept = [tensor.data.clone() for tensor in out]
        for tensor in out:
            tensor.data.zero_()
        yield
        for tensor, was in zip(out, kept, strict=True):
            tensor.data.copy_(was)


def score_of(engine: Engine, tokens: Tensor, routes: np.ndarray | None = None) -> Canary:
    """As a server scores it: along its own routes, or along these."""
    at, rows = engine.model.parallel, CANARY_TOKENS - 1
    (pack,) = make_packs([[0]], [tokens], [1], at.layout, at.coord)
    if routes is not None:
        attach_routes(pack, torch.from_numpy(routes), at, route_shape(engine.model))
    [scored] = engine.logprobs([pack], "record" if routes is None else "replay", temperature=1.0)
    assert pack.passes.live_routes is not None
    return Canary(scored.logprobs[:rows].numpy(), pack.passes.live_routes[:rows].numpy() if routes is None else routes)


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    yield Engines()
    destroy_parallel()


@pytest.fixture(scope="module")
def calibrated(engines: Engines) -> CanaryLimits:
    """After one sync that was well."""
    limits, spread = CanaryLimits(None, BF16), engines.spread()
    assert limits.excess([spread]) is None
    limits.learn([spread])
    return limits


def test_other_weights_are_taken(engines: Engines, calibrated: CanaryLimits) -> None:
    for _ in range(6):
        engines.sync(0.02)
        assert calibrated.excess([engines.spread()]) is None, engines.spread()


@pytest.mark.parametrize("layer", [0, 3])
def test_a_layer_that_was_not_loaded_is_seen(engines: Engines, calibrated: CanaryLimits, layer: int) -> None:
    with engines.without(layer):
        assert calibrated.excess([GOOD, engines.spread()]) is not None


@pytest.mark.parametrize("layer", [0, 3])
def test_an_expert_of_zeros_is_seen(engines: Engines, calibrated: CanaryLimits, layer: int) -> None:
    """By the tail, where the largest difference alone, as it was, let it pass."""
    with engines.without(layer, engines.busiest_expert(layer)):
        spread = engines.spread()
    excess = calibrated.excess([spread])
    assert excess is not None and excess.limit < excess.value
    assert CanaryLimits(0.5, BF16).excess([spread]) is None


def test_limits_follow_a_slow_change_and_not_a_jump() -> None:
    limits = CanaryLimits(None, BF16)
    grown = GOOD
    for step in range(60):
        assert limits.excess([grown]) is None, step
        limits.learn([grown])
        grown = Spread(*(value * (1.05 if step < 40 else 1) for value in grown))
    jump = Spread(grown.median * FACTOR * 1.01, grown.tail, grown.largest)
    excess = limits.excess([grown, jump])
    assert excess is not None and (excess.server, excess.what) == (1, "median")


def test_what_the_user_gave_holds_alone() -> None:
    given = CanaryLimits(5.0, BF16)
    given.learn([GOOD])
    assert given.excess([Spread(0.4, 2.0, 4.9)]) is None and given.excess([Spread(0.4, 2.0, 5.1)]) is not None
    assert CanaryLimits(None, BF16).excess([Spread(0.3, 0.4, 0.49)]) is not None, "a first sync that is half wrong"


def test_a_difference_that_is_no_number_is_beyond_every_limit() -> None:
    spread = spread_of(torch.tensor([0.0, math.nan, 0.0]))
    assert spread.largest == math.inf and CanaryLimits(100.0, BF16).excess([spread]) is not None


def test_rounding_of_a_policy_that_has_sharpened_is_taken_in_float32() -> None:
    """As seen in the quickstart, at its 59th sync: the limit of the largest was 1e-4. A layer that was not loaded moves
    all tokens.
    """
    limits = CanaryLimits(None, torch.float32)
    rounded = Spread(1.9e-6, 4e-5, 1.51e-4)
    assert limits.excess([rounded]) is None
    limits.learn([rounded])
    assert limits.excess([rounded]) is None
    for wrong, what in ((Spread(2e-4, 3e-4, 5e-4), "median"), (Spread(2e-6, 5e-4, 2e-3), "largest difference")):
        found = limits.excess([rounded, wrong])
        assert found is not None and (found.server, found.what) == (1, what)
    first = CanaryLimits(None, torch.float32).excess([Spread(2e-4, 3e-4, 5e-4)])
    assert first is not None and first.what == "median"


@pytest.mark.parametrize("at_once", [1, 8])
def test_the_own_score_serves_all_servers_that_took_its_routes(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """The others are compared along theirs, all of them in one pass; the order of a row's experts is no other route."""
    engine, tokens = engines.rollout, engines.tokens
    own = OwnScore(engine, route_shape(engine.model), at_once * CANARY_TOKENS)
    same = score_of(engine, tokens)
    assert same.routes is not None
    swapped = Canary(same.logprobs, same.routes[..., ::-1].copy())
    others = [score_of(engine, tokens, (same.routes + shift) % 8) for shift in (1, 3)]
    off = Canary(same.logprobs + np.float32(0.5), same.routes)
    assert all(np.abs(other.logprobs - same.logprobs).max() > 1e-3 for other in others)
    passes: list[str] = []
    original = engine.logprobs

    def logprobs(packs: list[Pack], routes: Routes, temperature: float | None = None) -> list[TokenScores]:
        passes.append(routes)
        return original(packs, routes, temperature)

    monkeypatch.setattr(engine, "logprobs", logprobs)
    own.take()
    assert [spread.largest for spread in own.spreads([("a", same), ("b", swapped)])] == [0, 0] and passes == ["record"]
    servers = [("a", same), ("b", others[0]), ("c", off), ("d", others[1]), ("e", Canary(same.logprobs, None))]
    found = own.spreads(servers)
    assert [round(spread.largest, 5) for spread in found] == [0, 0, 0.5, 0, 0] and passes == ["record", "replay"]
    assert found[2].median == pytest.approx(0.5, abs=1e-5)
    monkeypatch.setattr(own_score, "make_packs", None)  # of a layout that is known
    own.take()
    assert [spread.largest for spread in own.spreads(servers)] == [spread.largest for spread in found]
    wrong = Canary(same.logprobs, same.routes * 0)
    with pytest.raises(UserError, match="routes of the canary from http://f: .*nothing was captured"):
        own.spreads([("http://f", wrong)])
