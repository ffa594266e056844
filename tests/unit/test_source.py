"""Which groups make a batch while others are in flight: the bound on lag, who is waited for, what a resume knows."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megarl.config import Config, load_config
from megarl.data import Prompt, PromptStream
from megarl.errors import Stopped
from megarl.loop import source
from megarl.loop.sampler import Sampler
from megarl.loop.source import LockStep, Overlapped, Progress, _Group, choose
from megarl.rollout.client import RolloutClient
from megarl.rollout.patience import longest_wait_s
from megarl.rollout.registry import NoServers
from tools.bench.stub_server import StubServer, generated

B, N = 4, 2  # groups of a batch, optimizer steps of a batch


def config(*keys: str) -> Config:
    return load_config(None, [f"batch.prompts={B}", "batch.group=2", f"batch.minibatches={N}", *keys])


ONE_OFF = config(f"rollout.max_lag={N}")


def groups(*finished: bool) -> list[_Group]:
    return [_Group(number, number, 0, 0, done) for number, done in enumerate(finished)]


def test_the_first_that_are_finished_make_the_batch() -> None:
    made = groups(False, True, True, True, True, False)
    assert choose(made, 4, dict.fromkeys(range(6), 1), ONE_OFF) == [1, 2, 3, 4]
    assert choose(made[:4], 4, dict.fromkeys(range(4), 1), ONE_OFF) is None


def test_one_that_no_later_batch_may_take_is_waited_for() -> None:
    made = groups(False, True, True, True, True)
    assert choose(made, 4, {0: 0, 1: 0, 2: 0, 3: 0, 4: 1}, ONE_OFF) is None
    made[0].finished = True
    assert choose(made, 4, {0: 0, 1: 0, 2: 0, 3: 0, 4: 1}, ONE_OFF) == [0, 1, 2, 3]


def test_the_next_batch_must_hold_what_is_left_for_it() -> None:
    """Nine groups of one age: this batch and the next hold eight, so one of the five that are not finished is late."""
    made = groups(*[True] * 4, *[False] * 5)
    assert choose(made, 4, dict.fromkeys(range(9), 1), ONE_OFF) is None
    assert choose(made[:8], 4, dict.fromkeys(range(8), 1), ONE_OFF) == [0, 1, 2, 3]


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_no_order_of_finishing_breaks_the_bound_or_waits_for_ever(lag: int) -> None:
    """Random lengths, random moments; every drawn group is trained within `lag` batches, none is dropped."""
    draws, settings = random.Random(lag), config(f"rollout.max_lag={lag * N}")
    live: dict[int, _Group] = {}
    number = 0
    for batch in range(200):
        while len(live) < B * (1 + lag):
            live[number] = _Group(number, number, 0, batch * N)
            number += 1
        for group in live.values():
            group.finished = group.finished or draws.random() < 0.3
        while True:
            later = {n: (group.version + lag * N - batch * N) // N for n, group in live.items()}
            assert min(later.values()) >= 0
            chosen = choose([*live.values()], B, later, settings)
            if chosen is not None:
                break
            waiting = [group for group in live.values() if not group.finished]
            assert waiting, "nobody is left to wait for"
            draws.choice(waiting).finished = True
        for n in chosen:
            assert live.pop(n).finished


@pytest.fixture(scope="module", autouse=True)
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Bench:
    """A source over a server whose responses to prompt p take seconds[p] and are of `version`."""

    def __init__(self, settings: Config, prompts: int = 40) -> None:
        self.seconds: dict[int, float] = {}
        self.version = 0
        self.server = StubServer(self._reply)
        self.client = RolloutClient([self.server.info()], 20)
        sampler: Any = SimpleNamespace(
            client=self.client,
            stop_token_ids=[],
            check_routes=lambda rollouts: None,
            parallel=SimpleNamespace(
                layout=SimpleNamespace(dp=1), coord=SimpleNamespace(dp=0), is_main=True, host_group=None
            ),
        )
        self.stream = PromptStream(prompts, shuffle=False)
        self.source = Overlapped(settings, sampler, [Prompt([i], "", "", i) for i in range(prompts)], self.stream)

    async def _reply(self, asked: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
        version = self.version
        await asyncio.sleep(self.seconds.get(asked["prompts"][0][0], 0.0))
        return 200, generated(asked, 2, version=version)

    def step(self, number: int, wanted: int = B) -> list[int]:
        """The prompts of a step's groups, in their order; the weights move on after it."""
        sampled = self.source.next(wanted, 0, Progress(number, N * number))
        lines = {rollout.group: rollout.prompt.line for rollout in sampled.rollouts}
        assert len(sampled.rollouts) == 2 * wanted and sorted(lines) == list(range(wanted))
        self.version = N * (number + 1)
        return [lines[group] for group in range(wanted)]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(ONE_OFF)
    yield made
    made.client.close()
    made.server.close()


def test_a_long_group_does_not_hold_up_the_others_and_is_trained_in_time(bench: Bench) -> None:
    bench.seconds = {0: 0.6}
    first = bench.step(0)
    assert 0 not in first
    second = bench.step(1)
    assert 0 in second and not set(first) & set(second)
    values = bench.source.metrics(1.0)
    assert values["async/lag_max"] == N and values["async/dropped_groups"] == 0


def test_a_wait_for_rollouts_is_no_stall_as_long_as_they_may_still_come(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it seen as one later than that: request_timeout_s bounds it, on each server that a request may go to."""
    entered: list[str] = []
    monkeypatch.setattr(source, "enter", entered.append)
    assert bench.source._wait_s == longest_wait_s(600)
    bench.step(0)
    assert entered and {*entered} == {"rollout"}
    entered.clear()
    bench.source._wait_s = 0.0
    bench.step(1)
    assert not entered


def test_one_batch_is_ahead_and_no_prompt_is_lost_or_doubled(bench: Bench) -> None:
    seen = [line for number in range(5) for line in bench.step(number)]
    state = bench.source.state_dict()
    assert len(set(seen)) == len(seen) == 5 * B and len(state["returned"]) == B
    resumed = PromptStream(40, shuffle=False)
    resumed.load_state_dict(state)
    rest = resumed.next(40 - len(seen))
    assert sorted(seen + rest) == list(range(40))


def test_a_group_that_has_become_too_old_goes_back(bench: Bench) -> None:
    """As of a server that still had older weights."""
    bench.step(0)
    ahead = set(bench.source.state_dict()["returned"])
    bench.version = 4 * N
    taken = bench.step(4)
    values = bench.source.metrics(1.0)
    assert values["async/dropped_groups"] == B and values["async/lag_max"] == 0
    assert set(taken) <= ahead | set(range(2 * B, 4 * B)) and ahead <= {*taken, *bench.source.state_dict()["returned"]}


def test_where_the_last_server_is_lost_others_answer_what_it_had(bench: Bench) -> None:
    """recover() stands for the wait for a worker and the sync that it gets; no prompt is lost or asked for twice."""
    bench.seconds = dict.fromkeys(range(3), 0.2)  # the rest is answered before
    others: list[StubServer] = []

    def recover() -> None:
        others.append(StubServer(bench._reply))
        bench.client.set_workers([others[-1].info(1)])

    bench.source.sampler.recover = recover
    loss = threading.Timer(0.1, bench.server.close)
    loss.start()
    seen = bench.step(0) + bench.step(1)
    loss.join()
    seen += bench.step(2)
    # a request that was sent off before the loss was known may find no server once more
    assert others and len(set(seen)) == len(seen) == 3 * B
    assert not set(seen) & set(bench.source.state_dict()["returned"])
    for server in others:
        server.close()


def test_servers_that_one_rank_alone_cannot_reach_end_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """recover() finds them well each time."""
    monkeypatch.setattr(source, "RECOVERIES", 2)
    monkeypatch.setattr(source.time, "sleep", lambda seconds: None)
    worker, recovered = bench.server.info(1), list[int]()
    bench.server.close()

    def recover() -> None:
        recovered.append(1)
        bench.client.set_workers([worker])

    bench.source.sampler.recover = recover
    with pytest.raises(NoServers, match="^2 times in one batch a trainer rank found no rollout server"):
        bench.step(0)
    assert len(recovered) == 2


def sampler(recover: Any) -> Sampler:
    made = object.__new__(Sampler)
    made.parallel = SimpleNamespace(host_group=None)  # type: ignore[assignment]
    made.recover = recover
    return made


def test_a_rank_without_a_server_asks_again_once_there_is_one() -> None:
    recovered: list[int] = []
    answers: list[Any] = [NoServers("all are lost"), NoServers("again"), [["answer"]]]

    def ask() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert sampler(lambda: recovered.append(1))._served(ask) == [["answer"]] and recovered == [1, 1]
    answers = [NoServers(f"lost {i}") for i in range(3)]
    with pytest.raises(NoServers, match="lost 2"):  # whoever is asked these prompts is lost
        sampler(lambda: None)._served(ask)
    answers = [Stopped(15)]
    with pytest.raises(Stopped) as stopped:
        sampler(lambda: None)._served(ask)
    assert stopped.value.signum == 15
    answers = [NoServers("megarl eval has no other")]
    with pytest.raises(NoServers, match="no other"):
        sampler(None)._served(ask)


def test_lock_step_draws_when_asked() -> None:
    stream = PromptStream(8, shuffle=False)
    asked: list[list[int]] = []
    sampler: Any = SimpleNamespace(sample=lambda prompts, first, step, stop: asked.append([p.line for p in prompts]))
    source = LockStep(sampler, [Prompt([i], "", "", i) for i in range(8)], stream)
    stream.give_back([5])
    source.next(3, 0, Progress(0, 0))
    assert asked == [[5, 0, 1]] and source.state_dict()["returned"] == []


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_a_response_draws_from_the_same_seed_whichever_replica_asks(replicas: int) -> None:
    """3 prompts of 2 responses; the fourth replica has none to ask for."""
    drawn: dict[int, int] = {}

    def generate(tokens: list[list[int]], n: int, *given: Any) -> list[Any]:
        _, _, _, seed, first, total = given
        assert total == 3 and [each[0] for each in tokens] == [*range(first, first + len(tokens))]
        drawn.update({prompt[0]: seed + i * n for i, prompt in enumerate(tokens)})
        return []

    for replica in range(replicas):
        parallel = SimpleNamespace(
            layout=SimpleNamespace(dp=replicas), coord=SimpleNamespace(dp=replica), host_group=None
        )
        config = SimpleNamespace(rollout=SimpleNamespace(max_new_tokens=4))
        client = SimpleNamespace(generate=generate)
        sampler: Any = SimpleNamespace(parallel=parallel, config=config, client=client, stop_token_ids=[])
        sampler._share = partial(Sampler._share, sampler)
        Sampler._generate(sampler, [SimpleNamespace(tokens=[i]) for i in range(3)], 2, 1.0, 100)  # type: ignore[misc]
    assert drawn == {0: 100, 1: 102, 2: 104}
