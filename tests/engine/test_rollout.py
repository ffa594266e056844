"""What a rollout returns, against transformers' forward of the same weights."""

from __future__ import annotations

from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest

from megarl.rollout.client import RolloutClient, Server
from megarl.rollout.registry import RolloutError, WorkerInfo
from megarl.rollout.response import Response
from megarl.rollout.wire import decode
from tests.engine.support import EOS, Rollout, agent_asks, judged, prompts


def assert_judged(responses: list[list[Response]], checkpoint: Path, temperature: float = 1.0) -> None:
    """log mu and the sets of experts are those of the checkpoint, for every response."""
    differences, same_routes, rows = [], 0, 0
    for response in (response for group in responses for response in group):
        logprobs, experts = judged(checkpoint, response.tokens.tolist(), temperature)
        assert (
            response.logprobs.dtype == np.float32
            and len(response.logprobs) == len(response.tokens) - response.prompt_len
        )
        differences.append(response.logprobs - logprobs[response.prompt_len - 1 :])
        assert (
            response.routes is not None and response.routes.shape == experts.shape and response.routes.dtype == np.uint8
        )
        same_routes += (np.sort(response.routes, -1) == experts).all(-1).sum()
        rows += experts.shape[0] * experts.shape[1]
    d = np.concatenate(differences).astype(np.float64)
    k3 = np.mean(np.exp(-d) - 1 + d)
    print(
        f"{len(d)} tokens: mean |d| {np.abs(d).mean():.1e}, max {np.abs(d).max():.1e}, k3 {k3:.1e}; routes equal "
        f"{same_routes}/{rows}"
    )
    assert np.abs(d).max() <= 1e-4 and np.abs(d).mean() <= 2e-6 and k3 <= 1e-9
    assert same_routes == rows


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_mu_at_the_sampling_temperature(
    rollout: Rollout, checkpoints: tuple[Path, Path], temperature: float
) -> None:
    rollout.load(checkpoints[0])
    responses = rollout.client.generate(prompts(8, 8), 4, temperature, 16, [EOS])
    assert [len(group) for group in responses] == [4] * 8
    assert_judged(responses, checkpoints[0], temperature)


def test_trap_16_routes_survive_prefix_cache_hits(rollout: Rollout, checkpoints: tuple[Path, Path]) -> None:
    rollout.load(checkpoints[0])
    batch = prompts(3, 80)  # two and a half blocks of 32
    first = rollout.client.generate(batch, 3, 1.0, 16, [])
    second = rollout.client.generate(batch, 3, 1.0, 16, [])
    sampling = {"n": 1, "temperature": 1.0, "max_tokens": 1}
    header, _ = decode(
        rollout.client.servers[0].post("/megarl/generate", {"prompts": batch, "sampling": sampling, "seeds": None})
    )
    assert header["cached"] == [64, 64, 64]
    assert_judged(first, checkpoints[0])
    assert_judged(second, checkpoints[0])


def test_routes_of_a_response_serve_the_prompt_that_it_becomes(
    rollout: Rollout, checkpoints: tuple[Path, Path]
) -> None:
    """Blocks that filled up while several requests were decoded side by side, some of which ended before others."""
    rollout.load(checkpoints[0])
    batch = prompts(4, 20)
    for prompt, longer in zip(batch, (0, 3, 7, 11), strict=True):
        prompt += [3] * longer
    first = [group[0] for group in rollout.client.generate(batch, 1, 1.0, 60, [])]
    again = [response.tokens.tolist()[:70] for response in first]
    header, _ = decode(
        rollout.client.servers[0].post(
            "/megarl/generate",
            {"prompts": again, "sampling": {"n": 1, "temperature": 1.0, "max_tokens": 1}, "seeds": None},
        )
    )
    assert header["cached"] == [64] * 4
    assert_judged([first], checkpoints[0])
    assert_judged(rollout.client.generate(again, 2, 1.0, 8, []), checkpoints[0])


def test_stop_tokens_end_a_response_and_belong_to_it(rollout: Rollout) -> None:
    stop = [EOS, 5, 9, 12]
    responses = [r for group in rollout.client.generate(prompts(8, 8), 4, 1.0, 8, stop, seed=1) for r in group]
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    for r in responses:
        answer = r.tokens[r.prompt_len :].tolist()
        assert (answer[-1] in stop) == (r.finish_reason == "stop") and not set(answer[:-1]) & set(stop)
        assert r.finish_reason == "stop" or len(answer) == 8


def test_a_seed_repeats_the_draw(rollout: Rollout) -> None:
    """A request with a seed killed the engine where prefill was chunked."""
    batch = prompts(4, 40)
    once, twice, other = (rollout.client.generate(batch, 4, 1.0, 16, [], seed=seed) for seed in (11, 11, 1100))
    same = [np.array_equal(a.tokens, b.tokens) for x, y in zip(once, twice) for a, b in zip(x, y)]
    differs = [np.array_equal(a.tokens, b.tokens) for x, y in zip(once, other) for a, b in zip(x, y)]
    assert all(same) and not any(differs)
    assert len({tuple(r.tokens.tolist()) for group in once for r in group}) == 16


def test_score_is_teacher_forced(rollout: Rollout, checkpoints: tuple[Path, Path]) -> None:
    rollout.load(checkpoints[1])
    tokens = prompts(1, 64)[0]
    for _ in range(2):  # the second time the prefix is cached
        logprobs, routes = rollout.client.score(tokens)
        expected, experts = judged(checkpoints[1], tokens)
        assert routes is not None
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)
        np.testing.assert_array_equal(np.sort(routes, -1), experts)


def test_a_refused_request_is_one_line(rollout: Rollout) -> None:
    with pytest.raises(RolloutError, match=r"^rollout server http://\S+/megarl/generate: .*maximum") as caught:
        rollout.client.generate([[3] * 300], 1, 1.0, 16, [])
    assert "\n" not in str(caught.value)
    absent = WorkerInfo(0, "http://127.0.0.1:9", 1, 0, "", "")
    with pytest.raises(RolloutError, match="no connection"):
        RolloutClient([absent], timeout_s=2).generate([[3]], 1, 1.0, 1, [])


def test_trap_15_a_preempted_request_has_the_routes_and_logprobs_of_one_policy(
    rollout: Rollout, checkpoints: tuple[Path, Path]
) -> None:
    """Its KV cache is given away, and prompt and tokens so far go in
    again: rows of both passes are those of the checkpoint.
    """

    def resumed() -> int:
        return int(rollout.call("resumed_requests")[0])

    rollout.load(checkpoints[0])
    before = resumed()
    responses = rollout.client.generate(
        prompts(32, 60), 1, 1.0, 32, []
    )  # 2 blocks each fill the cache; the third is for half of them
    assert resumed() > before
    assert all(len(r.tokens) == 92 for group in responses for r in group)
    assert_judged(responses, checkpoints[0])


def test_an_agents_token_that_the_model_does_not_have_is_refused(
    rollout: Rollout, checkpoints: tuple[Path, Path]
) -> None:
    rollout.load(checkpoints[0])
    with pytest.raises(HTTPError) as refused:
        agent_asks(rollout.workers[0], [5, 10**6])
    assert (
        refused.value.code == 400 and b"token 1000000 of the prompt is none of the model's 32" in refused.value.read()
    )
    assert_judged(rollout.client.generate(prompts(2, 8), 1, 1.0, 4, []), checkpoints[0])


@pytest.mark.parametrize("token", ["", "of-another-run", "data"])
def test_a_stranger_opens_no_door(rollout: Rollout, checkpoints: tuple[Path, Path], token: str) -> None:
    """vLLM's control routes are on in this test; only the control token opens them."""
    rollout.load(checkpoints[0])
    info = rollout.workers[0]
    caller = Server(info.url, 60, info.tokens.data if token == "data" else token)
    why = "the trainer's alone" if token == "data" else "no token of this run, or another's"
    control = ["/collective_rpc", "/pause", "/megarl/sync/load", "/megarl/sync/commit", "/update_weight_version"]
    control += ["/inference/v1/abort_requests"]
    asking = ["/megarl/generate", "/megarl/score", "/inference/v1/generate", "/v1/completions"]
    for path in control + (asking if token != "data" else []):
        with pytest.raises(RolloutError, match=rf"^rollout server {info.url}{path}: .*{why}"):
            caller.post(path, {"method": "reload_weights", "kwargs": {"weights_path": str(checkpoints[1])}})
    assert rollout.client.weight_versions() == [rollout.version]
    assert_judged(rollout.client.generate(prompts(2, 8), 1, 1.0, 4, []), checkpoints[0])
