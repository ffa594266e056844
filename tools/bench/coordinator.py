"""The trainer's side of rollouts alone: many long responses at once from servers without a model, over loopback.

    python tools/bench/coordinator.py [--responses 2000] [--tokens 8192] [--layers 48] [--top-k 8] [--group 8]
                                      [--servers 4] [--json FILE]
    python tools/bench/coordinator.py --clients

The first: every group is a request of its own, all are sent at once, and each answer carries routes of all layers.
Prints requests a second, the longest time for which the dispatcher's event loop did not run, peak memory above the
start and how many times the answers' bytes that is. What is received stays until the end, as in a batch. The second:
one answer of 64 MiB by our connection and by the libraries that might stand in for it, median of 9, with what each
takes of memory above the start. The servers are processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import importlib
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megarl.replay.routes import check_routes  # noqa: E402
from megarl.rollout.connection import Connection  # noqa: E402
from megarl.rollout.dispatch import Answered, Dispatcher, Request, wait_for  # noqa: E402
from megarl.rollout.registry import WorkerInfo  # noqa: E402
from tools.bench.stub_server import StubServer, generated  # noqa: E402

PROMPT, LARGE, ROUNDS = 16, 2**26, 9  # tokens; bytes


def serve(pipe: Pipe, tokens: int, routes: tuple[int, int]) -> None:
    """A process: a server whose every answer is the same bytes, made once."""
    made: dict[int, Any] = {}

    async def reply(asked: dict[str, Any]) -> tuple[int, Any]:
        count = len(asked["prompts"]) * asked["sampling"]["n"]
        if count not in made:
            made[count] = generated(asked, tokens, routes)
        return 200, made[count]

    server = StubServer(reply)
    pipe.send(server.url)
    pipe.recv()


def large(pipe: Pipe) -> None:
    async def reply(asked: dict[str, Any]) -> tuple[int, Any]:
        return 200, [body]

    body = bytes(LARGE)
    server = StubServer(reply)
    pipe.send(server.url)
    pipe.recv()


def started(target: Callable[..., None], *args: Any) -> tuple[Any, Any, str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    return process, ours, ours.recv()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stalls:
    """The longest time for which a loop did not run what was due."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.longest, self._loop, self._due = 0.0, loop, time.monotonic()
        loop.call_soon_threadsafe(self._tick)

    def _tick(self) -> None:
        now = time.monotonic()
        self.longest = max(self.longest, now - self._due)
        self._due = now + 0.005
        self._loop.call_later(0.005, self._tick)


def coordinate(args: argparse.Namespace) -> dict[str, float]:
    servers = [started(serve, args.tokens, (args.layers, args.top_k)) for _ in range(args.servers)]
    workers = [WorkerInfo(i, url, 1, 0, "", "") for i, (_, _, url) in enumerate(servers)]
    dispatcher, done = Dispatcher(workers, 600.0), SimpleQueue[Answered]()
    warm = Request([[1] * PROMPT], args.group, {"n": args.group}, [0], done)
    dispatcher.submit(warm)
    wait_for([warm])
    count = args.responses // args.group
    requests = [Request([[1] * PROMPT], args.group, {"n": args.group}, [0], done) for _ in range(count)]
    before, stalls, start = peak_bytes(), Stalls(dispatcher._loop), time.perf_counter()
    for request in requests:
        dispatcher.submit(request)
    answers = wait_for(requests)
    seconds = time.perf_counter() - start
    responses = [response for answered in answers for group in answered.groups for response in group]
    taken = sum(r.logprobs.nbytes + (r.routes.nbytes if r.routes is not None else 0) for r in responses)
    above = peak_bytes() - before
    checking = time.perf_counter()
    for response in responses[: args.group]:
        assert response.routes is not None
        check_routes(response.routes, len(response.tokens) - 1, args.layers, 128, args.top_k)
    per_response = (time.perf_counter() - checking) / args.group
    dispatcher.close()
    for process, pipe, _ in servers:
        pipe.send(None)
        process.join(10)
    return {
        "responses": float(len(responses)),
        "seconds": seconds,
        "requests_per_s": count / seconds,
        "received_gib": taken / 2**30,
        "peak_above_start_gib": above / 2**30,
        "peak_over_received": above / taken,
        "longest_stall_ms": 1000 * stalls.longest,
        "route_check_ms_a_response": 1000 * per_response,
    }


def ours(url: str) -> int:
    async def ask() -> int:
        connection = await Connection.open(url)
        answer = await connection.post("/", {}, b"{}")
        connection.close()
        return len(answer.body)

    return asyncio.run(ask())


def standard(url: str) -> int:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
    connection.request("POST", "/", b"{}")
    size = len(connection.getresponse().read())
    connection.close()
    return size


def by_urllib3(url: str) -> int:
    return len(importlib.import_module("urllib3").request("POST", url, body=b"{}").data)


def by_httpx(url: str) -> int:
    return len(importlib.import_module("httpx").post(url, content=b"{}").content)


def by_aiohttp(url: str) -> int:
    aiohttp = importlib.import_module("aiohttp")

    async def ask() -> int:
        async with aiohttp.ClientSession() as session, session.post(url, data=b"{}") as answer:
            return len(await answer.read())

    return asyncio.run(ask())


CLIENTS = {"ours": ours, "http.client": standard, "urllib3": by_urllib3, "httpx": by_httpx, "aiohttp": by_aiohttp}


def measured(pipe: Pipe, name: str, url: str) -> None:
    """A process for one client: its own imports and memory."""
    ask = CLIENTS[name]
    try:
        importlib.import_module(name if name in ("urllib3", "httpx", "aiohttp") else "http.client")
    except ImportError:
        pipe.send(None)
        return
    before, times = peak_bytes(), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        assert ask(url) == LARGE
        times.append(time.perf_counter() - start)
    pipe.send((1000 * statistics.median(times), (peak_bytes() - before - LARGE) / 2**20))


def clients() -> dict[str, Any]:
    process, pipe, url = started(large)
    result = {}
    for name in CLIENTS:
        _, _, figures = started(measured, name, url)
        result[name] = figures
        shown = "not installed" if figures is None else f"{figures[0]:6.0f} ms, {figures[1]:6.0f} MiB above the body"
        print(f"{name:12} {shown}", flush=True)
    pipe.send(None)
    process.join(10)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("responses", 2000), ("tokens", 8192), ("layers", 48), ("top-k", 8), ("group", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--clients", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = clients() if args.clients else coordinate(args)
    if not args.clients:
        print("  ".join(f"{key} {value:.2f}" for key, value in result.items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
