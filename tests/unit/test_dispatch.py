"""The dispatcher against servers without a model, over real sockets: who gets what, and what a lost server costs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from megarl.rollout import connection
from megarl.rollout.client import RolloutClient
from megarl.rollout.connection import Connection, Unreachable
from megarl.rollout.dispatch import TRIES, Answered, Dispatcher, Request, take, wait_for
from megarl.rollout.registry import NoServers, RolloutError, WorkerInfo
from megarl.rollout.wire import ENGINE_DIED
from tools.bench.stub_server import Reply, StubServer, generated

N = 2


async def at_once(request: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
    return 200, generated(request, 3, (2, 2))


async def never(request: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
    await asyncio.sleep(60)
    raise AssertionError


@contextlib.contextmanager
def servers(*replies: Reply) -> Iterator[list[StubServer]]:
    started = [StubServer(reply) for reply in replies]
    try:
        yield started
    finally:
        for server in started:
            with contextlib.suppress(Exception):
                server.close()


@contextlib.contextmanager
def dispatcher(*workers: WorkerInfo, **settings: Any) -> Iterator[Dispatcher]:
    made = Dispatcher(workers, **{"timeout_s": 20.0, **settings})
    try:
        yield made
    finally:
        made.close()


def request(seed: int, done: SimpleQueue[Answered], url: str = "") -> Request:
    return Request([[7, 8]], N, {"n": N}, [seed], done, url)


def requests(count: int) -> list[Request]:
    done: SimpleQueue[Answered] = SimpleQueue()
    return [request(10 * i, done) for i in range(count)]


def until(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError


def test_answers_carry_what_was_asked() -> None:
    with servers(at_once) as (server,), dispatcher(server.info()) as dispatch:
        asked = requests(5)
        for one in asked:
            dispatch.submit(one)
        for i, answered in enumerate(wait_for(asked)):
            (group,) = answered.groups
            assert [response.tokens.tolist() for response in group] == [[7, 8, *[10 * i + k] * 3] for k in range(N)]
            assert all(response.routes is not None and response.routes.shape == (4, 2, 2) for response in group)
            assert group[0].weight_versions == [{"version": 0, "start": 0, "end": 3}]
        assert server.served == 5


def test_the_body_is_received_where_it_stays() -> None:
    """No copy of routes between the socket and the response: they are a view of the buffer that was received into."""
    with servers(at_once) as (server,), dispatcher(server.info()) as dispatch:
        (asked,) = requests(1)
        dispatch.submit(asked)
        routes = wait_for([asked])[0].groups[0][0].routes
        assert routes is not None and routes.base is not None and not routes.flags.owndata


def test_the_idler_server_is_asked_and_no_more_than_it_can_take() -> None:
    """at_once 4 is two requests of two responses; the fifth waits here until one is answered."""
    gates, sent = [threading.Event(), threading.Event()], [0, 0]

    def gated(i: int) -> Reply:
        async def reply(asked: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
            sent[i] += 1
            while not gates[i].is_set():
                await asyncio.sleep(0.005)
            return await at_once(asked)

        return reply

    with servers(gated(0), gated(1)) as (a, b), dispatcher(a.info(0), b.info(1), at_once=2 * N) as dispatch:
        asked = requests(5)
        for one in asked:
            dispatch.submit(one)
        assert take(asked[0].done, 0.3) == [] and sent == [2, 2]
        gates[1].set()
        until(lambda: asked[0].done.qsize() == 3)
        assert sent == [2, 3]
        gates[0].set()
        until(lambda: asked[0].done.qsize() == 5)
        busy = dispatch.busy_seconds()
        assert busy[a.url] > 0 and busy[b.url] > 0


def test_what_a_killed_server_had_goes_to_the_other() -> None:
    with servers(never, at_once) as (dying, living), dispatcher(dying.info(0), living.info(1)) as dispatch:
        asked = requests(6)
        for one in asked:
            dispatch.submit(one)
        until(lambda: living.served == 3 and len(dying.connections) == 3)
        dying.close()
        assert {answered.request for answered in wait_for(asked)} == set(asked) and living.served == 6
        assert (dispatch.taken_back(), dispatch.taken_back()) == (3, 0)


def test_a_server_cut_off_in_its_answer_loses_nothing() -> None:
    async def cut(asked: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
        parts = generated(asked, 3)
        broken = bytearray(10**6)
        for writer in [*dying.connections]:
            writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(broken)}\r\n\r\n".encode() + bytes(parts[0]))
            await writer.drain()
            writer.transport.abort()
        raise ConnectionResetError

    with servers(cut, at_once) as (dying, living), dispatcher(dying.info(0), living.info(1)) as dispatch:
        asked = requests(4)
        for one in asked:
            dispatch.submit(one)
        assert {answered.request for answered in wait_for(asked)} == set(asked)


@pytest.mark.parametrize("way", ["dropped", "left"])
def test_what_a_silent_server_had_is_taken_from_it(way: str) -> None:
    with servers(never, at_once) as (silent, living), dispatcher(silent.info(0)) as dispatch:
        asked = requests(3)
        for one in asked:
            dispatch.submit(one)
        if way == "dropped":
            dispatch.set_servers([silent.info(0), living.info(1)])
            assert take(asked[0].done, 0.2) == []
            dispatch.drop({silent.url: "has been silent"})
        else:
            dispatch.set_servers([living.info(1)])
        assert [answered.request for answered in wait_for(asked)] == asked


def test_requests_fail_in_one_line_where_no_server_is_left_and_the_next_one_is_asked() -> None:
    with servers(never, at_once) as (dying, later), dispatcher(dying.info(0)) as dispatch:
        (asked,) = requests(1)
        dispatch.submit(asked)
        until(lambda: bool(dying.connections))
        dying.close()
        with pytest.raises(NoServers, match=rf"^rollout server {dying.url}/megarl/generate: connection lost"):
            wait_for([asked])
        dispatch.set_servers([later.info(1)])
        dispatch.submit(asked)
        assert wait_for([asked])[0].groups


def test_a_refusal_fails_its_request_alone() -> None:
    async def refuses_odd(asked: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
        if asked["seeds"][0] == 10:
            return 500, [json.dumps({"error": "too long"}).encode()]
        return await at_once(asked)

    with servers(refuses_odd) as (server,), dispatcher(server.info()) as dispatch:
        asked = requests(3)
        for one in asked:
            dispatch.submit(one)
        answers = [answered for _ in range(3) for answered in take(asked[0].done, 5)]
        errors = [str(answered.error) for answered in answers if answered.error]
        assert errors == [f"rollout server {server.url}/megarl/generate: too long"]


def test_a_request_that_kills_servers_is_not_given_to_all_of_them() -> None:
    async def dies(asked: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
        return 500, [json.dumps({"error": ENGINE_DIED}).encode()]

    with (
        servers(*[dies] * TRIES, at_once) as started,
        dispatcher(*[server.info(i) for i, server in enumerate(started)]) as dispatch,
    ):
        done: SimpleQueue[Answered] = SimpleQueue()
        asked = [request(0, done, server.url) for server in started[:1]]
        dispatch.submit(asked[0])
        with pytest.raises(RolloutError, match=ENGINE_DIED):
            wait_for(asked)
        dispatch.submit(healthy := request(0, done))
        assert wait_for([healthy])[0].groups
        assert started[-1].served == 1


def counted(sent: list[int], i: int, then: Reply) -> Reply:
    async def reply(asked: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
        sent[i] += 1
        return await then(asked)

    return reply


def test_what_servers_lost_together_had_goes_to_none_of_them_and_counts_for_nothing() -> None:
    sent = [0, 0, 0, 0]
    replies = [counted(sent, i, reply) for i, reply in enumerate([never] * 3 + [at_once])]
    with servers(*replies) as started, dispatcher(*[s.info(i) for i, s in enumerate(started[:3])]) as dispatch:
        asked = requests(12)
        for one in asked:
            dispatch.submit(one)
        until(lambda: sent == [4, 4, 4, 0])
        dispatch.set_servers([server.info(i) for i, server in enumerate(started)])
        dispatch.drop({server.url: "has been silent" for server in started[:3]})
        assert len(wait_for(asked)) == 12
        assert sent == [4, 4, 4, 12] and {one.tries for one in asked} == {0}


def test_servers_that_nobody_reaches_end_no_request() -> None:
    with servers(*[at_once] * (TRIES + 1)) as started:
        for server in started[:-1]:
            server.close()
        with dispatcher(*[server.info(i) for i, server in enumerate(started)]) as dispatch:
            (asked,) = requests(1)
            dispatch.submit(asked)
            assert wait_for([asked])[0].groups and asked.tries == 0


def test_a_server_that_dies_of_a_request_on_a_kept_connection_counts() -> None:
    """Its address refuses then; the request was at work there all the same."""
    with servers(at_once) as (server,), dispatcher(server.info()) as dispatch:
        first, second = requests(2)
        dispatch.submit(first)
        wait_for([first])
        server.reply = never
        dispatch.submit(second)
        until(lambda: dispatch._links[server.url].free == [])
        server.close()
        with pytest.raises(NoServers, match="connection lost"):
            wait_for([second])
        assert second.tries == 1


def test_a_host_that_is_silent_is_told_from_a_server_that_dies() -> None:
    """The kernel gives it up (TCP_USER_TIMEOUT) as it would any other connection to there."""

    async def broken(by: OSError) -> BaseException | None:
        connection, answer = Connection(), asyncio.get_running_loop().create_future()
        connection._answer = answer
        connection.connection_lost(by)
        return answer.exception()

    silent = asyncio.run(broken(TimeoutError(110, "Connection timed out")))
    assert isinstance(silent, Unreachable) and str(silent) == "host is silent (Connection timed out)"
    assert isinstance(asyncio.run(broken(ConnectionResetError())), ConnectionResetError)


def test_a_server_that_takes_no_connection_is_told_from_one_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "CONNECT_S", 0.2)
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):  # the kernel takes one more than the backlog, and leaves later ones without an answer
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        info = WorkerInfo(0, f"http://127.0.0.1:{full.getsockname()[1]}", 1, 0, "", "")
        with dispatcher(info) as dispatch:
            (asked,) = requests(1)
            dispatch.submit(asked)
            with pytest.raises(NoServers, match="no connection within 0 s"):
                wait_for([asked])


@pytest.mark.parametrize("body", [b"", b"\x02\0\0\0{}", b"\x09\0\0\0not\njson", b'\x0d\0\0\0{"arrays":[]}'])
def test_an_answer_that_cannot_be_read_fails_its_request_alone(body: bytes) -> None:
    async def garbled(asked: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
        return (200, [body]) if asked["seeds"][0] == 10 else await at_once(asked)

    with servers(garbled) as (server,), dispatcher(server.info()) as dispatch:
        asked = requests(3)
        for one in asked:
            dispatch.submit(one)
        until(lambda: asked[0].done.qsize() == 3)
        (error,) = [str(answered.error) for answered in take(asked[0].done, 0) if answered.error]
        assert error.startswith(f"rollout server {server.url}/megarl/generate: its answer cannot be read (")
        assert "\n" not in error


def test_a_response_that_was_cut_off_is_sampled_by_another_server() -> None:
    async def cut_off(asked: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
        return 200, generated(asked, 3, (2, 2), finish="abort")

    with servers(cut_off, at_once) as (ending, living):
        with dispatcher(ending.info(0), living.info(1)) as dispatch:
            (asked,) = requests(1)
            asked.url = ending.url
            dispatch.submit(asked)
            assert [response.finish_reason for response in wait_for([asked])[0].groups[0]] == ["stop"] * N
            assert (ending.served, living.served, dispatch.taken_back()) == (1, 1, 1)
        with dispatcher(ending.info()) as dispatch:
            (asked,) = requests(1)
            dispatch.submit(asked)
            with pytest.raises(NoServers, match=f"{ending.url}/megarl/generate: a response .* ended by 'abort'"):
                wait_for([asked])


def test_what_is_abandoned_before_it_begins_takes_no_room() -> None:
    """Both in one turn of the loop: the task that asks never runs."""
    with servers(at_once) as (server,), dispatcher(server.info(), at_once=N) as dispatch:
        first, second = requests(2)
        dispatch._call(lambda: (dispatch._queue(first), dispatch._abandon([first])))
        dispatch.submit(second)
        assert [answered.request for answered in take(second.done, 20.0)] == [second]


def test_no_answer_in_time_loses_the_server() -> None:
    with servers(never) as (server,), dispatcher(server.info(), timeout_s=0.3) as dispatch:
        (asked,) = requests(1)
        dispatch.submit(asked)
        with pytest.raises(RolloutError, match="no answer within 0 s"):
            wait_for([asked])


def test_an_abandoned_request_is_let_go_of() -> None:
    with servers(never) as (server,), dispatcher(server.info()) as dispatch:
        (asked,) = requests(1)
        dispatch.submit(asked)
        until(lambda: bool(server.connections))
        dispatch.abandon([asked])
        until(lambda: not server.connections)
        assert take(asked.done, 0.1) == []


def test_a_connection_that_was_closed_while_free_costs_nothing() -> None:
    with servers(at_once) as (server,), dispatcher(server.info()) as dispatch:
        for _ in range(2):
            (asked,) = requests(1)
            dispatch.submit(asked)
            wait_for([asked])
            for writer in [*server.connections]:
                server._loop.call_soon_threadsafe(writer.transport.abort)
            until(lambda: not server.connections)
            time.sleep(0.1)  # until the client has seen it too
        assert server.served == 2


def test_a_batch_is_one_request_a_server() -> None:
    """So that a draw hangs on the prompts alone, not on what else a server has at work."""
    with servers(at_once, at_once) as (a, b):
        client = RolloutClient([a.info(0), b.info(1)], 20)
        try:
            groups = client.generate([[i] for i in range(5)], N, 1.0, 3, [], seed=100)
        finally:
            client.close()
        assert [group[0].tokens.tolist() for group in groups] == [[i, *[100 + N * i] * 3] for i in range(5)]
        assert (a.served, b.served) == (1, 1)
        assert np.array_equal(groups[4][1].tokens, [4, 109, 109, 109])


@pytest.mark.parametrize(("mine", "counts"), [(range(1, 5), (3, 1)), (range(4, 7), (0, 3))])
def test_a_batch_of_several_ranks_is_split_over_the_servers_as_a_whole(mine: range, counts: tuple[int, int]) -> None:
    """Of 7 prompts the first 4 are one server's, whichever rank asks for them."""
    asked = {0: 0, 1: 0}

    def counting(server: int) -> Reply:
        async def reply(request: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
            asked[server] += len(request["prompts"])
            return await at_once(request)

        return reply

    with servers(counting(0), counting(1)) as (a, b):
        client = RolloutClient([a.info(0), b.info(1)], 20)
        try:
            groups = client.generate([[i] for i in mine], N, 1.0, 3, [], seed=100, first=mine[0], total=7)
        finally:
            client.close()
    assert [group[0].tokens.tolist() for group in groups] == [[i, *[100 + N * k] * 3] for k, i in enumerate(mine)]
    assert (asked[0], asked[1]) == counts


def test_a_server_that_leaves_finishes_what_it_has_and_gets_nothing_new() -> None:
    """Also where the step that agrees on it comes before it has finished."""
    gate, answered = threading.Event(), [0, 0]

    def counted(i: int, wait: bool) -> Reply:
        async def reply(asked: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
            while wait and not gate.is_set():
                await asyncio.sleep(0.005)
            answered[i] += 1
            return await at_once(asked)

        return reply

    with servers(counted(0, True), counted(1, False)) as (a, b), dispatcher(a.info(0)) as dispatch:
        first, second = requests(2)
        dispatch.submit(first)
        until(lambda: len(a.connections) == 1)
        dispatch.retire(a.url)
        dispatch.set_servers([b.info(1)])
        dispatch.submit(second)
        assert take(first.done, 20.0)[0].request is second
        gate.set()
        assert take(first.done, 20.0)[0].request is first and answered == [1, 1]


def test_the_same_servers_are_named_again_only_where_one_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with servers(at_once, at_once) as (one, two), dispatcher(one.info(0), two.info(1)) as made:
        calls, real = list[str](), made._call
        monkeypatch.setattr(made, "_call", lambda what, *given: calls.append(what.__name__) or real(what, *given))
        made.set_servers([two.info(1), one.info(0)])
        assert not calls
        for lose in (lambda: made.drop({one.url: "is gone"}), lambda: made.retire(one.url)):
            lose()
            calls.clear()
            made.set_servers([one.info(0), two.info(1)])
            made.set_servers([one.info(0), two.info(1)])
            assert calls == ["_set_servers"]
        made.set_servers([two.info(1)])
        assert [*made._links] == [two.url]


def test_where_no_server_is_left_the_error_says_so() -> None:
    with servers(at_once) as (server,), dispatcher(server.info()) as dispatch:
        server.close()
        (asked,) = requests(1)
        dispatch.submit(asked)
        with pytest.raises(NoServers, match=r"no connection \(ConnectionRefusedError\)"):
            wait_for([asked])
    with pytest.raises(NoServers, match="^no rollout server is left$"):
        client = RolloutClient([], 5)
        try:
            client.generate([[1]], 1, 1.0, 1, [])
        finally:
            client.close()
