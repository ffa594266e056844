"""Rows of generate and eval, and what an evaluation says of its scores."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megarl.commands import responses
from megarl.commands.jsonl import rows_to
from megarl.commands.responses import Answered
from megarl.config import load_config
from megarl.data import Prompt
from megarl.reward.figures import evaluation_figures
from megarl.reward.pool import Score
from megarl.rollout.client import RolloutClient
from megarl.rollout.response import Response
from tools.bench.stub_server import StubServer, generated

BAD = Score(math.nan, "raised ValueError")


@pytest.mark.parametrize(
    ("scores", "figures"),
    [
        ([Score(1), Score(0), Score(0), Score(0)], (0.25, 0.5, 0)),
        ([Score(0.5), Score(0.4), Score(0.9), Score(0)], (0.45, 0.0, 0)),  # below the threshold: no pass
        ([BAD, Score(1), Score(0), Score(0)], (1 / 3, 0.5, 1)),  # a failed reward is no 0
        ([BAD, BAD, Score(1), Score(0)], (0.5, 1.0, 2)),  # nor is a prompt without any
    ],
)
def test_fault_20_mean_and_pass_at_k(scores: list[Score], figures: tuple[float, float, float]) -> None:
    found = evaluation_figures(scores, 2, 1.0)
    assert (found["eval/mean_at_k"], found["eval/pass_at_k"], found["eval/bad_samples"]) == pytest.approx(figures)
    assert found["eval/k"] == 2


def test_an_evaluation_without_any_reward_has_no_figure() -> None:
    assert evaluation_figures([BAD, BAD], 2, 1.0) == {"eval/k": 2.0, "eval/bad_samples": 2.0}


def response(tokens: list[int], prompt_len: int) -> Response:
    logprobs = np.zeros(len(tokens) - prompt_len, np.float32)
    return Response(np.array(tokens, np.int32), prompt_len, logprobs, None, [], "stop")


def test_fault_17_rows_carry_text_prompt_and_reward() -> None:
    group = [response([1, 2, 3], 1), response([1, 4], 1)]
    with_answer = Answered(Prompt([1], "7", "x=", 1), group, ["a", "b"], [Score(1.0), BAD])
    first, second = with_answer.rows()
    assert (first["prompt"], first["text"], first["answer"], first["reward"]) == ("x=", "a", "7", 1.0)
    assert (second["reward"], second["reward_fault"]) == (None, "raised ValueError") and "reward_fault" not in first
    assert first["tokens"] == [1, 2, 3] and first["prompt_len"] == 1 and first["routes"] is None
    without = Answered(Prompt([1], "", "x=", 1, has_answer=False), group, ["a", "b"], [])
    assert all("reward" not in row and "answer" not in row for row in without.rows())


def test_groups_come_in_the_order_of_the_prompts_whatever_ends_first() -> None:
    async def reply(asked: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
        ((prompt,),) = asked["prompts"]
        await asyncio.sleep(0.02 * (7 - prompt))
        return 200, generated(asked, 1)

    config = load_config(None, ["rollout.max_num_seqs=48", "run.seed=5"])
    prompts = [Prompt([i], "", "", i) for i in range(7)]
    servers = [StubServer(reply), StubServer(reply)]
    fleet: Any = SimpleNamespace(client=RolloutClient([server.info(i) for i, server in enumerate(servers)], 20))
    try:
        with responses._asking(fleet, config, prompts, 2, 1.0, []) as batches:
            tokens = [group[0].tokens.tolist() for groups in batches for group in groups]
        assert tokens == [[i, 5 + 2 * i] for i in range(7)]
    finally:
        fleet.client.close()
        for server in servers:
            server.close()


@pytest.mark.parametrize("slow", ["first prompt", "caller"])
def test_answers_do_not_pile_up_before_a_slow_prompt_or_a_slow_caller(slow: str) -> None:
    """4 prompts at a time on the only server, and as many again that wait: before, all 40 were asked for."""
    opens, config = threading.Event(), load_config(None, ["rollout.max_num_seqs=8"])
    of_prompt, of_caller = (opens.wait, None) if slow == "first prompt" else (None, opens.wait)

    async def reply(asked: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
        if of_prompt and asked["prompts"] == [[0]]:
            await asyncio.to_thread(of_prompt, 30)
        return 200, generated(asked, 1)

    def consume() -> None:
        with responses._asking(fleet, config, prompts, 2, 1.0, []) as batches:
            for groups in batches:
                came.append(len(groups))
                if of_caller:
                    of_caller(30)

    server, came = StubServer(reply), list[int]()
    fleet: Any = SimpleNamespace(client=RolloutClient([server.info()], 20, at_once=8))
    prompts = [Prompt([i], "", "", i) for i in range(40)]
    consumer = threading.Thread(target=consume)
    consumer.start()
    try:
        time.sleep(0.5)
        assert 0 < server.served <= 8 and sum(came) <= 8
        opens.set()
        consumer.join(30)
        assert sum(came) == server.served == 40
    finally:
        opens.set()
        consumer.join()
        fleet.client.close()
        server.close()


def test_a_file_of_rows_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyError), rows_to(path) as write:
        write({"a": 1})
        raise KeyError
    assert not path.exists()
    with rows_to(path) as write:
        write({"a": "ä\u2028"})
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == [{"a": "ä\u2028"}]
