"""Syncs and their canary between trainer and servers: who is compared, when, and what a wrong or a lost one means."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megarl.config import CANARY_TOKENS  # noqa: E402
from megarl.data import Prompt  # noqa: E402
from megarl.engine.batch import make_packs  # noqa: E402
from megarl.errors import Stopped, UserError  # noqa: E402
from megarl.launch.stop import StopRequest  # noqa: E402
from megarl.loop import refit as refit_module  # noqa: E402
from megarl.loop.evaluate import Evaluation  # noqa: E402
from megarl.loop.learn import Learner  # noqa: E402
from megarl.loop.refit import Refit  # noqa: E402
from megarl.observe import trace  # noqa: E402
from megarl.rollout.fleet import LeftOut, WorkersLost  # noqa: E402
from megarl.rollout.patience import longest_wait_s  # noqa: E402
from megarl.rollout.sync_leader import Canary  # noqa: E402
from tests.unit.scripted_loop import GROUP, MIXED, build, collect, model_folder  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from model_folder(tmp_path_factory)


class ScoredFleet:
    """Two servers whose scores of the canary are the trainer's, off by `wrong`; a sync sends nothing."""

    def __init__(self) -> None:
        self.right = np.zeros(CANARY_TOKENS - 1, np.float32)
        self.wrong = {"http://one": 0.0, "http://two": 0.0}
        self.members = [SimpleNamespace(url=url) for url in self.wrong]
        self.loses = False  # one of them, before it has scored
        self.new = ""  # a URL
        self.limits: list[float] = []  # of its scores, seconds

    def gather(self, asked: Any, ask_all: bool) -> bool:
        lost, self.loses = self.loses, False
        return lost

    def push(self, buckets: Any, canary: list[int], in_flight: Any, phase: Any) -> None:
        self.asked = bool(canary)

    def loaded(self) -> list[Canary]:
        return [score for _, score in self.scored(self)] if self.asked else []

    def commit(self, version: int) -> None:
        pass

    def leave_out(self, failed: dict[str, str]) -> None:
        if self.new in failed:
            del self.wrong[self.new]
            self.members = [SimpleNamespace(url=url) for url in self.wrong]
            raise LeftOut

    def score(self, canary: list[int], timeout_s: float) -> ScoredFleet:
        self.limits.append(timeout_s)
        return self

    def scored(self, scoring: Any) -> list[tuple[str, Canary]]:
        if self.loses:
            raise WorkersLost("http://one is lost")
        return self._scores()

    def answered(self) -> list[tuple[str, Canary]]:
        """Of a scoring, which this is too."""
        return self._scores()[1:]

    def _scores(self) -> list[tuple[str, Canary]]:
        return [(url, Canary(self.right + np.float32(off), None)) for url, off in self.wrong.items()]


def refitted(folder: Path, *overrides: str) -> tuple[Refit, ScoredFleet]:
    engine, loop, _ = build(folder, [], *overrides)
    fleet: Any = ScoredFleet()
    refit, at = Refit(loop.config, engine, fleet), engine.model.parallel
    refit.synced, refit.outgoing = True, cast(Any, SimpleNamespace(bytes=0, buckets=lambda params: []))
    [scored] = engine.logprobs(make_packs([[0]], [refit.own.tokens], [1], at.layout, at.coord), "off", temperature=1.0)
    fleet.right[:] = scored.logprobs[: CANARY_TOKENS - 1]
    return refit, fleet


DIFFERS = r"the canary differs by 0\.5 .* between the trainer and http://two; the worker"


def test_the_canary_tells_a_wrong_server_from_a_hard_batch(folder: Path) -> None:
    """What a guarded batch is followed by (megarl/train.py): every server is asked, without a sync."""
    refit, fleet = refitted(folder)
    refit.check()
    fleet.wrong["http://two"] = 0.5
    with pytest.raises(UserError, match=DIFFERS):
        refit.check()


@pytest.mark.parametrize("max_lag", [0, 1])
def test_a_new_worker_whose_canary_differs_is_left_out(folder: Path, max_lag: int) -> None:
    refit, fleet = refitted(folder, f"rollout.max_lag={max_lag}", "sync.digests=off")
    refit.synced = False
    fleet.new, fleet.wrong["http://two"] = "http://two", 0.5
    assert refit.sync(1)["sync/canary_max_diff"] == 0 and [*fleet.wrong] == ["http://one"]


def test_with_requests_in_flight_the_canary_is_compared_before_the_next_update(folder: Path) -> None:
    """The sync does not wait for it; in lock-step it does."""
    lock_step, fleet = refitted(folder)
    fleet.wrong["http://two"] = 0.5
    with pytest.raises(UserError, match=DIFFERS):
        lock_step.sync(1)
    refit, fleet = refitted(folder, "rollout.max_lag=1")
    assert "sync/canary_max_diff" not in refit.sync(1)
    refit.settle()
    assert refit.sync(2)["sync/canary_max_diff"] == 0  # of the sync before
    fleet.wrong["http://two"] = 0.5
    with pytest.raises(UserError, match=DIFFERS):
        refit.settle()
    refit.settle()  # once


def test_a_canary_among_requests_has_their_time(folder: Path) -> None:
    """It waits for its turn, also where the sync waits for it: no step of a sync has so long."""
    limits = ["sync.timeout_s=7", "sync.digests=off", "rollout.request_timeout_s=90"]
    refit, fleet = refitted(folder, *limits, "rollout.max_lag=1")
    refit.synced = False
    refit.sync(0)
    refit.sync(1)
    refit.check()
    assert fleet.limits == [90, 90, 90]
    lock_step, fleet = refitted(folder, *limits)
    lock_step.sync(1)
    lock_step.check()
    assert fleet.limits == [7]


def test_a_worker_lost_before_its_canary_leaves_no_other_uncompared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sync is done again without it, and waits for the canary of the others."""
    monkeypatch.setattr(Refit, "connect", lambda refit: None)
    refit, fleet = refitted(folder, "rollout.max_lag=1")
    refit.sync(1)
    fleet.loses = True
    refit.settle()
    assert refit.sync(2)["sync/canary_max_diff"] == 0
    fleet.loses = True
    refit.check()
    monkeypatch.setattr(fleet, "scored", lambda scoring: pytest.fail("who is no member any more is asked for a canary"))
    refit.settle()
    monkeypatch.undo()
    monkeypatch.setattr(Refit, "connect", lambda refit: None)
    refit.sync(3)
    fleet.loses, fleet.wrong["http://two"] = True, 0.5
    with pytest.raises(UserError, match=DIFFERS):
        refit.settle()


@pytest.mark.parametrize("new", [False, True])
def test_a_server_is_compared_as_it_sampled_before_another_sync_mends_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    """Its responses would else be learnt from: also those of requests that were kept over a sync with a new member."""
    refit, fleet = refitted(folder, "rollout.max_lag=1", "sync.digests=off")
    monkeypatch.setattr(refit, "connect", lambda: fleet.wrong.update({"http://two": 0.0}))
    refit.sync(1)
    refit.synced = not new
    fleet.loses, fleet.wrong["http://two"] = True, 0.5
    with pytest.raises(UserError, match=DIFFERS):
        if new:
            monkeypatch.setattr(fleet, "gather", lambda asked, ask_all: not fleet.loses)
            refit.sync(2)
        refit.settle()


@pytest.mark.parametrize("left", [0, 1])
def test_a_server_that_dies_after_a_wrong_canary_ends_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """The next batch may have what it sampled. A server that has died is asked no more: its fleet takes it for new."""
    monkeypatch.setattr(Refit, "connect", lambda refit: None)
    refit, fleet = refitted(folder, "rollout.max_lag=1")
    monkeypatch.setattr(fleet, "check", lambda ask_all: None, raising=False)
    monkeypatch.setattr(fleet, "workers", fleet.members[:left], raising=False)
    refit.sync(1)
    fleet.new, fleet.wrong["http://two"] = "http://two", 0.5
    with pytest.raises(UserError, match=DIFFERS):
        refit.ready(1)
        refit.settle()


def test_a_response_of_a_version_that_no_sync_committed_is_bad(folder: Path) -> None:
    _, loop, client = build(folder, [MIXED] * 4)
    client.version = 143
    with pytest.raises(
        UserError, match="step 1: response 0 .*: sampled with weights of version 143, not 0, which syncs committed"
    ):
        collect(loop)


def test_after_a_response_of_other_weights_the_servers_are_checked(folder: Path) -> None:
    """As after any guarded batch, where such a batch is left out and does not end the run."""
    engine, loop, client = build(folder, [MIXED] * 4, "train.on_bad_batch=skip")
    client.version = 143
    batch, _ = collect(loop)
    learned = Learner(loop.config, engine).learn(batch, 0)
    assert batch.metrics["batch/bad_samples"] == 16 and learned.metrics["batch/guarded"] == 1
    assert learned.guarded == "16 responses are of weights that no sync committed within rollout.max_lag"


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_wait_for_responses_has_a_limit_of_its_own(
    folder: Path, evaluated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, loop, client = build(folder, [MIXED], "rollout.request_timeout_s=7200")
    prompts, at = [Prompt(loop.tokenizer.encode("12="), "3", "12=", 1)], list[float]()
    generate = client.generate
    monkeypatch.setattr(client, "generate", lambda *a, **k: (at.append(trace.entered()[2]), generate(*a, **k))[1])
    if evaluated:
        loop.sampler.sample_for_evaluation(prompts, GROUP, 1.0)
    else:
        loop.sampler.sample(prompts, 0, 0)
    assert at == [longest_wait_s(7200)] and trace.entered()[2] == 0


def test_a_signal_ends_the_wait_of_an_evaluation(folder: Path) -> None:
    _, loop, _ = build(folder, [MIXED], "eval.every=1")
    loop.sampler.recover = lambda: None
    stop = StopRequest(600, lambda: True)
    stop.asked = 15
    prompts = [Prompt(loop.tokenizer.encode("12="), "3", "12=", 1)]
    try:
        with pytest.raises(Stopped):
            Evaluation(loop.config, loop.sampler, loop.scorer, prompts, None, stop=stop).after(1, last=False)
    finally:
        stop.close()


def test_an_export_that_servers_read_is_no_stall(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refit, fleet = refitted(folder, f"run.dir={tmp_path}")
    entered: list[tuple[str, float]] = []
    monkeypatch.setattr(refit_module, "enter", lambda name, within_s=0.0: entered.append((name, within_s)))
    monkeypatch.setattr(refit_module, "reading_s", lambda read: 1000.0 if (read / "config.json").exists() else 0.0)
    monkeypatch.setattr(fleet, "check_digests", lambda read: None, raising=False)
    refit._check_digests(1)
    *tensors, last = entered
    assert tensors == [("an export", 0.0)] * len(refit.engine.model.weight_map.hf_shapes)
    assert last == ("the comparison of digests", refit.config.sync.timeout_s + 1000)
