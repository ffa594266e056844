"""Weights that arrive in a running server: what it computes then, what serves after a
failure, and how that is mended.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megarl.rollout.client import Server, let_go
from megarl.rollout.registry import RolloutError
from megarl.rollout.response import Response
from megarl.rollout.sync_leader import Canary, InFlight
from megarl.rollout.wire import ENGINE_DIED, decode
from megarl.weights.reshard.outgoing import whole_buckets
from tests.engine.support import ROOT, Pusher, Rollout, agent_asks, judged, prompts
from tests.engine.test_rollout import assert_judged

VICTIM = "model.layers.2.mlp.experts.3.down_proj.weight"
CANARY = prompts(1, 64)[0]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def assert_serves(rollout: Rollout, checkpoint: Path, version: int) -> None:
    assert rollout.client.weight_versions() == [version]
    groups = rollout.client.generate(prompts(3, 40), 1, 1.0, 8, [])
    assert_judged(groups, checkpoint)
    assert all(r.weight_versions == [{"version": version, "start": 0, "end": 8}] for group in groups for r in group)


def assert_refuses(rollout: Rollout) -> None:
    """Neither ours nor vLLM's own routes answer."""
    with pytest.raises(RolloutError, match="neither old nor new"):
        rollout.client.generate(prompts(1, 8), 1, 1.0, 8, [])
    with pytest.raises(RolloutError, match="neither old nor new"):
        rollout.client.servers[0].post(
            "/inference/v1/generate", {"token_ids": [3, 4], "sampling_params": {"max_tokens": 1}}
        )


def assert_a_whole_sync_mends(rollout: Rollout, checkpoint: Path) -> None:
    """Over a new connection."""
    rollout.pusher = None
    rollout.load(checkpoint)
    assert_serves(rollout, checkpoint, rollout.version)


def test_after_an_update_the_server_computes_with_the_new_weights(
    rollout: Rollout, checkpoints: tuple[Path, Path]
) -> None:
    """Holds the expert repack (megarl.server.vllm_patches) and the
    prefix cache: the same prompts, cached, before and after.
    """
    batch = prompts(4, 80)
    for checkpoint in (checkpoints[0], checkpoints[1], checkpoints[0]):
        rollout.load(checkpoint)
        assert rollout.client.weight_versions() == [rollout.version]
        responses = rollout.client.generate(batch, 2, 1.0, 16, [])
        assert_judged(responses, checkpoint)
        for response in (r for group in responses for r in group):
            assert response.weight_versions == [{"version": rollout.version, "start": 0, "end": len(response.logprobs)}]


def test_vllm_alone_keeps_a_stale_prefix_cache(rollout: Rollout, checkpoints: tuple[Path, Path]) -> None:
    """Our load resets the cache because vLLM's does not. Where this fails, vLLM does it by itself and ours may go."""
    rollout.load(checkpoints[0])
    batch = prompts(4, 80)
    rollout.client.generate(batch, 1, 1.0, 4, [])
    rollout.call("reload_weights", weights_path=str(checkpoints[1]))
    response = rollout.client.generate(batch, 1, 1.0, 4, [])[0][0]
    expected, _ = judged(checkpoints[1], response.tokens.tolist())
    assert np.abs(response.logprobs - expected[response.prompt_len - 1 :]).max() > 1e-2
    rollout.load(checkpoints[1])
    assert_judged(rollout.client.generate(batch, 1, 1.0, 4, []), checkpoints[1])


def test_digests_are_those_of_an_engine_loaded_from_disk(rollout: Rollout, checkpoints: tuple[Path, Path]) -> None:
    """And without the expert repack both the canary and the digests say so."""
    pusher = rollout.connect(checkpoints[1])
    pusher.push(weights(checkpoints[1]), 7)
    pusher.leader.check(str(checkpoints[1]))
    rollout.fault("no_prepack")
    (logprobs, _) = pusher.load(weights(checkpoints[0]), CANARY)[0]
    assert np.abs(logprobs - judged(checkpoints[0], CANARY)[0]).max() > 1e-2
    with pytest.raises(
        RolloutError, match=r"rollout rank 1 does not hold what an engine loaded from \S+/a holds: \d+ weights.*experts"
    ):
        pusher.leader.check(str(checkpoints[0]))
    pusher = rollout.connect(checkpoints[0])
    (logprobs, _) = pusher.load(weights(checkpoints[0]), CANARY)[0]
    assert np.abs(logprobs - judged(checkpoints[0], CANARY)[0]).max() < 1e-4
    pusher.leader.check(str(checkpoints[0]))
    with pytest.raises(RolloutError, match=r"weights differ, first lm_head\..*"):
        pusher.leader.check(str(checkpoints[1]))
    rollout.pusher = None


def test_trainers_that_begin_again_take_a_worker_that_came_late(
    rollout: Rollout, checkpoints: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The digests of its start were never taken: that ended the run."""
    rollout.load(checkpoints[0])
    pusher = rollout.connect(checkpoints[0])
    rollout.fault("came_late")
    pusher.push(weights(checkpoints[0]), 93)
    pusher.leader.check(None)
    assert "has served other trainers of this run: its weights are compared by checksums" in capsys.readouterr().out
    pusher.leader.check(str(checkpoints[0]))
    rollout.version = 93
    rollout.pusher = None


def test_digests_without_room_for_a_second_model(rollout: Rollout, checkpoints: tuple[Path, Path]) -> None:
    """As on a GPU: the serving model is filled again from the export, layer by layer; other weights are told."""
    pusher = rollout.connect(checkpoints[1], staged=False)
    pusher.push(weights(checkpoints[1]), 8)
    rollout.fault("no_second_model")
    pusher.leader.check(str(checkpoints[1]))
    rollout.version = 8
    assert_serves(rollout, checkpoints[1], 8)
    with pytest.raises(RolloutError, match=r"does not hold what an engine loaded from \S+/a holds: \d+ weights differ"):
        pusher.leader.check(str(checkpoints[0]))
    rollout.pusher = None


@pytest.mark.parametrize("staged", [True, False])
def test_an_expert_of_zeros_is_told(rollout: Rollout, checkpoints: tuple[Path, Path], staged: bool) -> None:
    """Loaded well and lost afterwards, as by a kernel's packing: neither a checksum nor, of one sync in many, a digest
    would see it.
    """
    pusher = rollout.connect(checkpoints[0], staged=staged)
    pusher.push(weights(checkpoints[0]), 90)
    rollout.fault("zero_expert")
    with pytest.raises(
        RolloutError, match=r"rollout rank 1 does not hold what it received: 1 parts differ, first layer 2, exp"
    ):
        pusher.push(weights(checkpoints[1]), 91)
    assert_refuses(rollout)
    assert_a_whole_sync_mends(rollout, checkpoints[1])


def test_a_worker_is_held_to_what_a_sync_before_it_said(rollout: Rollout, checkpoints: tuple[Path, Path]) -> None:
    """One that comes late: its own first sync must not be what says that an expert never agrees."""
    pusher = rollout.connect(checkpoints[0])
    pusher.push(weights(checkpoints[0]), 90)
    agreeing = pusher.leader.commit(90, ask_agreeing=True)
    assert "layer 2, experts" in agreeing
    rollout.fault("came_late")
    late = rollout.connect(checkpoints[1])
    rollout.fault("zero_expert")
    late.push(weights(checkpoints[1]), 91)  # not told: not seen
    rollout.fault("came_late")
    late = rollout.connect(checkpoints[1], agreeing=agreeing)
    rollout.fault("zero_expert")
    with pytest.raises(RolloutError, match="does not hold what it received: 1 parts differ, first layer 2, exp"):
        late.push(weights(checkpoints[1]), 92)
    assert_a_whole_sync_mends(rollout, checkpoints[1])


@pytest.mark.parametrize("staged", [True, False])
def test_a_flipped_bit_is_named(rollout: Rollout, checkpoints: tuple[Path, Path], staged: bool) -> None:
    """Staged, the old version goes on serving; unstaged, nothing serves until a whole sync has come."""
    rollout.load(checkpoints[0])
    pusher = rollout.connect(checkpoints[1], staged=staged)
    rollout.fault("flip", VICTIM)
    found = rf"^rollout server {rollout.workers[0].url}\S+: weight sync: {VICTIM}\[0:64, 0:64\] from trainer rank 0 arrived with checksum"
    with pytest.raises(RolloutError, match=found + r" \w+, was sent with \w+ \(rollout rank 1\)$"):
        pusher.push(weights(checkpoints[1]), 99)
    if staged:
        assert_serves(rollout, checkpoints[0], rollout.version)
    else:
        assert_refuses(rollout)
    assert_a_whole_sync_mends(rollout, checkpoints[1])


def test_a_load_that_fails_half_way_is_mended_by_a_whole_sync(rollout: Rollout, checkpoints: tuple[Path, Path]) -> None:
    """Holds abandon_reload (megarl.server.vllm_reload)."""
    rollout.load(checkpoints[0])
    rollout.fault("fail_loading")
    with pytest.raises(RolloutError, match="the test ended this load half way"):
        rollout.load(checkpoints[1])
    assert_refuses(rollout)
    assert_a_whole_sync_mends(rollout, checkpoints[1])


@pytest.mark.parametrize("staged", [True, False])
def test_the_next_load_follows_the_plan_of_the_first(
    rollout: Rollout, checkpoints: tuple[Path, Path], staged: bool
) -> None:
    """Without vLLM's own loader, to the same digests."""
    pusher = rollout.connect(checkpoints[0], staged=staged)
    pusher.push(weights(checkpoints[0]), 80)
    rollout.fault("no_walk")
    pusher.push(weights(checkpoints[1]), 81)
    rollout.fault("none")  # unstaged, the digests themselves are vLLM's own load of a folder
    pusher.leader.check(str(checkpoints[1]))
    assert_serves(rollout, checkpoints[1], 81)
    assert_a_whole_sync_mends(rollout, checkpoints[0])


@pytest.mark.parametrize("phase", ["receive", "commit"])
def test_a_killed_sender(rollout: Rollout, checkpoints: tuple[Path, Path], phase: str) -> None:
    """Before anything is loaded the old version serves; before the
    version is committed nothing does; a whole sync mends both.
    """
    rollout.load(checkpoints[0])
    port = str(rollout.store.port)
    command = [
        sys.executable,
        "-m",
        "tests.engine.killed_sender",
        phase,
        port,
        json.dumps(dataclasses.asdict(rollout.workers[0])),
        str(checkpoints[1]),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -9, done.stderr
    if phase == "receive":
        assert_serves(rollout, checkpoints[0], rollout.version)
    else:
        assert_refuses(rollout)
    assert_a_whole_sync_mends(rollout, checkpoints[1])


def test_a_colocated_server_sleeps_and_gets_its_weights_through_shared_memory(
    rollout: Rollout, checkpoints: tuple[Path, Path]
) -> None:
    """launch.colocate. vLLM's CPU worker has no memory to free, but its
    scheduler stops, its caches go, and it comes back.
    """
    pusher = rollout.connect(checkpoints[1], staged=False, shared=True)
    pusher.push(weights(checkpoints[1]), 70)
    assert_serves(rollout, checkpoints[1], 70)
    ask = {"prompts": prompts(2, 80), "sampling": {"n": 1, "temperature": 1.0, "max_tokens": 1}, "seeds": None}
    cached = lambda: decode(rollout.client.servers[0].post("/megarl/generate", ask))[0]["cached"]
    assert cached() is not None and cached() == [64, 64]
    pusher.leader.turn("sleep")
    for route, body in (
        ("/megarl/generate", ask),
        ("/inference/v1/generate", {}),
        ("/megarl/sync/load", {"canary": []}),
    ):
        with pytest.raises(RolloutError, match="asleep while the trainer has the GPU"):
            Server(rollout.workers[0].url, 60, rollout.workers[0].tokens.control).post(route, body)
    pusher.leader.turn("wake")
    assert cached() == [0, 0]
    assert_serves(rollout, checkpoints[1], 70)
    pusher.push(weights(checkpoints[0]), 71)
    assert_serves(rollout, checkpoints[0], 71)
    rollout.pusher = None


def test_a_flipped_bit_in_shared_memory_is_named(rollout: Rollout, checkpoints: tuple[Path, Path]) -> None:
    pusher = rollout.connect(checkpoints[1], shared=True)
    rollout.fault("flip", VICTIM)
    with pytest.raises(
        RolloutError, match=rf"weight sync: {VICTIM}\[0:64, 0:64\] from trainer rank 0 arrived with checksum"
    ):
        pusher.push(weights(checkpoints[1]), 99)
    rollout.pusher = None


def test_connecting_to_a_server_that_is_not_there_ends_in_time(
    rollout: Rollout, checkpoints: tuple[Path, Path]
) -> None:
    absent = [dataclasses.replace(rollout.workers[0], url="http://127.0.0.1:9")]
    with pytest.raises(RolloutError, match="connection lost"):
        Pusher(rollout.store, rollout.store.port, absent, 3, True).connect(weights(checkpoints[0]))


def load_in_flight(rollout: Rollout, checkpoint: Path, how: str, meanwhile: Callable[[], Any] = lambda: None) -> Canary:
    """As Rollout.load, while requests run; after one. Returns the canary's score. meanwhile: called while the server
    has paused and waits for weights.
    """
    pusher = rollout.pusher
    assert pusher is not None
    rollout.version += 1
    buckets = whole_buckets(weights(checkpoint).items(), pusher.manifest)

    def send() -> None:
        meanwhile()
        pusher.sender.send(buckets)

    pusher.leader.push(send, CANARY, pusher.sender.close, InFlight(how, rollout.version, 60))
    (canary,) = pusher.leader.loaded()
    pusher.leader.commit(rollout.version)
    return canary


@pytest.mark.parametrize("how", ["recompute", "keep"])
def test_an_agents_request_hits_nothing_of_older_weights(
    rollout: Rollout, checkpoints: tuple[Path, Path], how: str
) -> None:
    """By vLLM's own route, whose requests bring no salt of ours."""
    (prompt,) = prompts(1, 80)
    rollout.load(checkpoints[0])
    agent_asks(rollout.workers[0], prompt)
    early: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    ask = threading.Thread(target=lambda: early.put(agent_asks(rollout.workers[0], prompt)), daemon=True)
    load_in_flight(rollout, checkpoints[1], how, lambda: (ask.start(), time.sleep(0.5)))
    for choice in (early.get(timeout=60), agent_asks(rollout.workers[0], prompt)):
        expected, _ = judged(checkpoints[1], prompt + choice["token_ids"])
        found = [token["logprob"] for token in choice["logprobs"]["content"]]
        np.testing.assert_allclose(found, expected[len(prompt) - 1 :], atol=1e-4)


def test_a_version_that_comes_again_hits_nothing_of_the_first(rollout: Rollout, checkpoints: tuple[Path, Path]) -> None:
    """Trainers that begin again from a checkpoint count on from it, and ask for the same prompts."""
    batch = prompts(2, 80)
    rollout.load(checkpoints[0])
    for checkpoint in (checkpoints[1], checkpoints[0]):
        load_in_flight(rollout, checkpoint, "keep")
        assert_judged(rollout.client.generate(batch, 1, 1.0, 4, []), checkpoint)
        rollout.version -= 1
    rollout.version += 2


@pytest.mark.parametrize("how", ["recompute", "keep", "finish"])
def test_weights_in_flight(rollout: Rollout, checkpoints: tuple[Path, Path], how: str) -> None:
    """A sync while responses are being sampled: every token's version, probability and route are those of the weights
    that it was sampled with, also where keys and values were computed again; what was kept is told by it.
    """
    old, new = checkpoints
    rollout.load(old)
    first = rollout.version
    answers: queue.SimpleQueue[list[list[Response]]] = queue.SimpleQueue()
    batch = prompts(6, 40)
    threading.Thread(target=lambda: answers.put(rollout.client.generate(batch, 2, 1.0, 80, [])), daemon=True).start()
    time.sleep(0.15)
    canary = load_in_flight(rollout, new, how)
    np.testing.assert_allclose(canary.logprobs, judged(new, CANARY)[0], atol=1e-4)
    groups = answers.get(timeout=60)
    spans = [[span["version"] for span in r.weight_versions] for group in groups for r in group]
    assert all(versions == ([first] if how == "finish" else [first, rollout.version]) for versions in spans), spans
    worst = 0.0
    for response in (r for group in groups for r in group):
        assert response.routes is not None
        for span, checkpoint in zip(response.weight_versions, (old, new)):
            expected, experts = judged(checkpoint, response.tokens.tolist())
            rows = slice(response.prompt_len - 1 + span["start"], response.prompt_len - 1 + span["end"])
            away = np.abs(response.logprobs[span["start"] : span["end"]] - expected[rows]).max()
            if how == "keep" and checkpoint == new:
                worst = max(worst, away)
                continue
            assert away < 1e-4
            np.testing.assert_array_equal(np.sort(response.routes[rows], -1), experts[rows])
    assert how != "keep" or worst > 1e-3  # old keys under new weights are neither policy
    assert_serves(rollout, new, rollout.version)


@pytest.mark.parametrize("fault", ["", "fail_loading"])
def test_a_server_that_is_let_go_ends_what_it_has(rollout: Rollout, checkpoints: tuple[Path, Path], fault: str) -> None:
    """A sync that has paused it fails, and it leaves: responses wait for no other sync. They go on with the old
    weights, or, where these are not whole, end for whoever asks another server.
    """
    old, new = checkpoints
    rollout.load(old)
    pusher, answers = rollout.pusher, queue.SimpleQueue[Any]()
    assert pusher is not None

    def ask() -> None:
        try:
            answers.put(rollout.client.generate(prompts(6, 40), 2, 1.0, 80, []))
        except RolloutError as error:
            answers.put(error)

    def send() -> None:
        if not fault:
            raise ValueError("the test sends nothing")
        pusher.sender.send(whole_buckets(weights(new).items(), pusher.manifest))

    rollout.fault(fault or "none")
    threading.Thread(target=ask, daemon=True).start()
    time.sleep(0.15)
    with pytest.raises((ValueError, RolloutError), match="the test"):
        pusher.leader.push(send, [], pusher.sender.close, InFlight("recompute", rollout.version + 1, 60))
        pusher.leader.loaded()
    threading.Thread(target=ask, daemon=True).start()  # what comes in the pause waits too
    with pytest.raises(queue.Empty):
        answers.get(timeout=1)
    while not let_go(rollout.workers[0]):
        time.sleep(0.1)
    both = [answers.get(timeout=60) for _ in range(2)]
    if fault:
        assert all(ENGINE_DIED in str(answer) for answer in both), both
        rollout.client.dispatcher.set_servers(rollout.workers)
    else:
        spans = [span["version"] for answer in both for group in answer for r in group for span in r.weight_versions]
        assert spans == [rollout.version] * 24
        assert_serves(rollout, old, rollout.version)
    assert_a_whole_sync_mends(rollout, new)
