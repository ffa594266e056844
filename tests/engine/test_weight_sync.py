"""Weights that arrive in a running server: what it then computes, what it refuses, and how long a failure may take."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import megarl.rollout.sync as sync_module
from megarl.rollout.client import RolloutError
from megarl.weights.pack import buckets
from tests.engine.support import Rollout, judged, prompts
from tests.engine.test_rollout import assert_judged


def test_after_an_update_the_server_computes_with_the_new_weights(rollout: Rollout, checkpoints: tuple[Path, Path]) -> None:
    """Holds the expert repack (megarl.rollout.vllm_patches) and the prefix cache: the same prompts, cached, before and after."""
    batch = prompts(4, 80)
    for checkpoint in (checkpoints[0], checkpoints[1], checkpoints[0]):
        report = rollout.load(checkpoint)
        assert report.tensors == len(load_file(checkpoint / "model.safetensors")) and report.bytes > 1.9e6
        assert rollout.client.weight_versions() == [rollout.version]
        responses = rollout.client.generate(batch, 2, 1.0, 16, [])
        assert_judged(responses, checkpoint)
        for response in (r for group in responses for r in group):
            assert response.weight_versions == [{"version": rollout.version, "start": 0, "end": len(response.logprobs)}]


def test_vllm_alone_keeps_a_stale_prefix_cache(rollout: Rollout, checkpoints: tuple[Path, Path]) -> None:
    """Our finish resets the cache because vLLM's does not. Where this fails, vLLM does it by itself and ours may go."""
    rollout.load(checkpoints[0])
    batch = prompts(4, 80)
    rollout.client.generate(batch, 1, 1.0, 4, [])
    server = rollout.client.servers[0]
    server.post("/start_weight_update", {})
    for bucket in buckets(load_file(checkpoints[1] / "model.safetensors").items(), 2**22):
        rollout.sync._send(bucket)
    server.post("/finish_weight_update", {"weight_version": "999"})
    response = rollout.client.generate(batch, 1, 1.0, 4, [])[0][0]
    expected, _ = judged(checkpoints[1], response.tokens.tolist())
    assert np.abs(response.logprobs - expected[response.prompt_len - 1 :]).max() > 1e-2
    rollout.load(checkpoints[1])
    assert_judged(rollout.client.generate(batch, 1, 1.0, 4, []), checkpoints[1])


def test_connecting_to_a_server_that_is_not_there_ends_in_time(rollout: Rollout) -> None:
    start = time.monotonic()
    sync = sync_module.BroadcastSync("127.0.0.1", rollout.store.port, timeout_s=3)
    absent = [dataclasses.replace(rollout.workers[0], url="http://127.0.0.1:9")]
    with pytest.raises(RolloutError, match="connection lost"):
        import torch

        sync.connect(rollout.store, absent, torch.device("cpu"))
    assert time.monotonic() - start < 10
