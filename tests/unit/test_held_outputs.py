"""Outputs of vLLM's engine that are kept until a request ends say, all together, what they said one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from megarl.server.held_outputs import HeldOutputs


class Logprobs(NamedTuple):
    ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray
    counts: Any = None


@dataclass
class Output:
    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    new_logprobs: Logprobs | None = None
    routed_experts: np.ndarray | None = None
    prefill_stats: str | None = None
    new_prompt_logprobs_tensors: Any = None
    prompt_token_id_logprobs: Any = None


@dataclass
class Outputs:
    outputs: list[Output] = field(default_factory=list)
    weight_version: str = ""
    finished_requests: Any = None
    scheduler_stats: Any = None


def sampled(name: str, token: int, first: bool = False, end: str | None = None) -> Output:
    rows = 3 if first else 1  # a prompt of three tokens
    logprobs = Logprobs(np.array([[token]]), np.array([[-token / 8]], np.float32), np.array([token]))
    return Output(name, [token], end, logprobs, np.full((rows, 2, 1), token, np.uint8), "stats" if first else None)


def waits(request: str) -> bool:
    return request != "streams"


def test_a_request_goes_out_once_whole() -> None:
    held, requests = HeldOutputs(), {"a": "a", "b": "b", "s": "streams"}
    step = {0: Outputs([sampled("a", 1, True), sampled("s", 5, True), sampled("b", 9, True, "stop")])}
    assert held.before("v1", Outputs) == []
    held.take(step, requests, waits)
    assert [out.request_id for out in step[0].outputs] == ["s", "b"]  # one that streams, one that ends at once
    step = {0: Outputs([sampled("a", 2)])}
    held.take(step, requests, waits)
    assert step == {}
    step = {0: Outputs([sampled("a", 3, end="length")])}
    held.take(step, requests, waits)
    (out,) = step[0].outputs
    assert (out.new_token_ids, out.finish_reason, out.prefill_stats) == ([1, 2, 3], "length", "stats")
    assert isinstance(out.new_logprobs, Logprobs) and out.new_logprobs.counts is None
    np.testing.assert_array_equal(out.new_logprobs.logprobs[:, 0], np.array([-1, -2, -3], np.float32) / 8)
    assert out.new_logprobs.ids.tolist() == [[1], [2], [3]] and out.new_logprobs.ranks.tolist() == [1, 2, 3]
    assert out.routed_experts is not None and out.routed_experts[:, 0, 0].tolist() == [1, 1, 1, 2, 3]


def test_what_was_sampled_under_the_old_weights_is_told_under_their_version() -> None:
    held, requests = HeldOutputs(), {"a": "a"}
    for token in (1, 2):
        assert held.before("v1", Outputs) == []
        held.take({0: Outputs([sampled("a", token, token == 1)])}, requests, waits)
    ((client, early),) = held.before("v2", Outputs)
    assert (client, early.weight_version, early.outputs[0].new_token_ids) == (0, "v1", [1, 2])
    assert early.outputs[0].finish_reason is None
    step = {0: Outputs([sampled("a", 3, end="stop")])}
    held.take(step, requests, waits)
    assert step[0].outputs[0].new_token_ids == [3] and held.before("v3", Outputs) == []


def test_an_aborted_request_is_forgotten() -> None:
    held, requests = HeldOutputs(), {"a": "a"}
    held.before("v1", Outputs)
    held.take({0: Outputs([sampled("a", 1, True)])}, requests, waits)
    held.take({}, {}, waits)
    assert held.before("v2", Outputs) == []
    step = {0: Outputs([sampled("a", 7, True, end="stop")], finished_requests={"x"})}
    held.take(step, {"a": "a"}, waits)
    assert step[0].outputs[0].new_token_ids == [7]
