"""Requests for responses, spread over the rollout servers: each to the server with the least work, again to another
where a server dies.

A thread with an asyncio loop keeps all connections, so that the trainer's own thread computes meanwhile.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import heapq
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from megarl.door import header
from megarl.rollout.connection import Answer, Connection, Unreachable
from megarl.rollout.patience import TRIES
from megarl.rollout.registry import NoServers, RolloutError, ServerLost, WorkerInfo
from megarl.rollout.response import CutOff, Response, responses_of
from megarl.rollout.wire import ENGINE_DIED, refusal_of

GENERATE = "/megarl/generate"


@dataclass(eq=False)
class Request:
    """n responses to each of `prompts`, answered as a whole. seeds: of the first response to each prompt.

    done: where its Answered goes. url: the server that is to have it, as long as it lives; "" for any. tries: servers
    lost by what may be its doing (TRIES).
    """

    prompts: list[list[int]]
    n: int
    sampling: dict[str, Any]
    seeds: list[int] | None
    done: SimpleQueue[Answered] = field(default_factory=SimpleQueue)
    url: str = ""
    tries: int = 0

    @property
    def responses(self) -> int:
        return self.n * len(self.prompts)


@dataclass(frozen=True)
class Answered:
    """groups: by prompt, n responses each. error: why there are none."""

    request: Request
    groups: list[list[Response]]
    error: RolloutError | None = None


@dataclass(frozen=True)
class _Running:
    number: int
    link: _Link
    task: asyncio.Task[None]


class _Link:
    """One server: its free connections, and how many responses it has at work."""

    def __init__(self, worker: WorkerInfo) -> None:
        self.url, self.headers = worker.url, header(worker.tokens.data)
        self.free: list[Connection] = []
        self.at_work, self.lost, self.leaves = 0, False, False
        self.busy_s, self._since = 0.0, 0.0

    def load(self, responses: int) -> None:
        if not self.at_work:
            self._since = time.monotonic()
        self.at_work += responses
        if not self.at_work:
            self.busy_s += time.monotonic() - self._since

    def busy_so_far(self) -> float:
        return self.busy_s + (time.monotonic() - self._since if self.at_work else 0.0)

    def close(self) -> None:
        for connection in self.free:
            connection.close()
        self.free.clear()


class Dispatcher:
    """Safe from any thread. A request that a server answers by a refusal fails; one whose server is lost is sent to
    another, from its beginning; where none is left it fails with NoServers.

    timeout_s: of one answer, from its sending. at_once: responses that one server has at work, 0 is any number; what
    is more waits here, where a later server can take it.
    """

    def __init__(self, workers: Sequence[WorkerInfo], timeout_s: float, at_once: int = 0) -> None:
        self._timeout_s, self._at_once = timeout_s, at_once
        self._links: dict[str, _Link] = {}
        # a heap: what was asked first goes first, also when it comes back
        self._waiting: list[tuple[int, Request]] = []
        self._numbers = itertools.count()
        self._running: dict[Request, _Running] = {}
        self._last_error: RolloutError | None = None
        self._taken_back = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
        self._thread.start()
        self.set_servers(workers)

    def set_servers(self, workers: Sequence[WorkerInfo]) -> None:
        """Whom to ask from now on. A server that was lost and is named again is tried again; what a server has at work
        that is named no more goes to the others.
        """
        # elsewhere than in the loop's thread, which may be busy with an answer: only this method adds or removes links
        whole = not any(link.lost or link.leaves for link in self._links.values())
        if not whole or self._links.keys() != {worker.url for worker in workers}:
            self._call(self._set_servers, list(workers))

    def submit(self, request: Request) -> None:
        """Its Answered comes to request.done."""
        self._loop.call_soon_threadsafe(self._queue, request)

    def abandon(self, requests: Sequence[Request]) -> None:
        """Nobody wants them any more: a server that works on one drops it, and nothing comes to their queues."""
        self._call(self._abandon, list(requests))

    def drop(self, why: Mapping[str, str]) -> None:
        """What these servers have at work goes to the others; they are not asked before set_servers names them again.
        why: by URL.
        """
        self._call(self._drop, dict(why))

    def retire(self, url: str) -> None:
        """This server finishes what it has at work, and gets nothing new."""
        self._call(self._retire, url)

    def busy_seconds(self) -> dict[str, float]:
        """By server, how long it has had something at work since the dispatcher was made."""
        return self._call(lambda: {link.url: link.busy_so_far() for link in self._links.values()})

    def taken_back(self) -> int:
        """Prompts that were at work in servers when these were lost, since this was asked last."""
        return self._call(self._count)

    def close(self) -> None:
        if self._thread.is_alive():
            self._call(lambda: self._abandon([*self._running, *(request for _, request in self._waiting)]))
            self._call(self._close_links)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        result: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            try:
                result.set_result(function(*args))
            except BaseException as error:
                result.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return result.result(60)

    # What follows runs in the loop's thread.

    def _count(self) -> int:
        count, self._taken_back = self._taken_back, 0
        return count

    def _close_links(self) -> None:
        for link in self._links.values():
            link.close()

    def _set_servers(self, workers: list[WorkerInfo]) -> None:
        named = {worker.url: worker for worker in workers}
        for url, worker in named.items():  # first, so that what the others give up finds them
            if url in self._links:
                self._links[url].lost = self._links[url].leaves = False
            else:
                self._links[url] = _Link(worker)
        left = [url for url, link in self._links.items() if url not in named and not (link.leaves and link.at_work)]
        self._drop(dict.fromkeys(left, "left the run"))
        for url in left:
            del self._links[url]

    def _queue(self, request: Request) -> None:
        heapq.heappush(self._waiting, (next(self._numbers), request))
        self._pump()

    def _abandon(self, requests: list[Request]) -> None:
        gone = set(requests)
        self._waiting = [(number, request) for number, request in self._waiting if request not in gone]
        heapq.heapify(self._waiting)
        for request in gone:
            if request in self._running:
                self._take(request).task.cancel()

    def _take(self, request: Request) -> _Running:
        """No longer at work. Here and not in its task, which may be cancelled before it begins."""
        running = self._running.pop(request)
        running.link.load(-request.responses)
        return running

    def _pump(self) -> None:
        """Sends what waits, as far as the servers take it."""
        usable = [link for link in self._links.values() if not link.lost and not link.leaves]
        if not usable:
            self._give_up()
        later = []
        while self._waiting:
            number, request = heapq.heappop(self._waiting)
            link = self._link_for(request, usable)
            if link is None:
                later.append((number, request))
                if not request.url:
                    break  # nobody has room
                continue
            link.load(request.responses)
            task = self._loop.create_task(self._run(link, request))
            self._running[request] = _Running(number, link, task)
        for item in later:
            heapq.heappush(self._waiting, item)

    def _link_for(self, request: Request, usable: list[_Link]) -> _Link | None:
        if request.url and (wanted := self._links.get(request.url)) and wanted in usable:
            return wanted
        link = min(usable, key=lambda link: link.at_work)
        fits = not self._at_once or not link.at_work or link.at_work + request.responses <= self._at_once
        return link if fits or request.url else None

    def _give_up(self) -> None:
        error = NoServers(str(self._last_error or "no rollout server is left"))
        while self._waiting:
            _, request = heapq.heappop(self._waiting)
            request.done.put(Answered(request, [], error))

    def _retire(self, url: str) -> None:
        if url in self._links:
            self._links[url].leaves = True
            self._pump()

    async def _run(self, link: _Link, request: Request) -> None:
        """Where it is cancelled, whoever does so has taken the request."""
        at, its_doing = f"rollout server {link.url}{GENERATE}", True
        try:
            answered = _answered(at, request, await self._ask(link, request))
        except ServerLost as error:
            lost: RolloutError = error
        except TimeoutError:
            lost = RolloutError(f"{at}: no answer within {self._timeout_s:.0f} s")
        except Unreachable as error:
            lost, its_doing = RolloutError(f"{at}: {error}"), False
        except OSError as error:
            lost = RolloutError(f"{at}: connection lost ({type(error).__name__})")
        else:
            self._finish(answered)
            return
        request.tries += its_doing
        self._mark(link, lost)  # what else it has at work is left to find out by itself
        self._again(request, lost)
        self._pump()

    def _finish(self, answered: Answered) -> None:
        self._take(answered.request)
        answered.request.done.put(answered)
        self._pump()

    def _again(self, request: Request, lost: RolloutError) -> None:
        """Back among those that wait, in its old place, unless it may be what loses servers."""
        running = self._take(request)
        self._taken_back += len(request.prompts)
        if request.tries >= TRIES:
            request.done.put(Answered(request, [], lost))
        else:
            heapq.heappush(self._waiting, (running.number, request))

    def _drop(self, why: dict[str, str]) -> None:
        """All are marked before anything goes to others, which else were the next of them."""
        errors = {url: RolloutError(f"rollout server {url}: {what}") for url, what in why.items() if url in self._links}
        for url, error in errors.items():
            self._mark(self._links[url], error)
        for request, running in [*self._running.items()]:
            if running.link.url in errors:
                running.task.cancel()
                self._again(request, errors[running.link.url])
        self._pump()

    def _mark(self, link: _Link, error: RolloutError) -> None:
        """A server that cannot be asked any more."""
        link.lost, self._last_error = True, error
        link.close()

    async def _ask(self, link: _Link, request: Request) -> Answer:
        given = {"prompts": request.prompts, "sampling": request.sampling, "seeds": request.seeds}
        body = json.dumps(given, separators=(",", ":")).encode()
        asked = False
        async with asyncio.timeout(self._timeout_s):
            while link.free:
                connection = link.free.pop()
                if connection.closed:
                    continue
                asked = True
                with contextlib.suppress(ConnectionError):  # the server has closed it while it was free
                    return await self._post(link, connection, body)
                if connection.begun:
                    raise ConnectionResetError("in the middle of an answer")
            try:
                connection = await Connection.open(link.url)
            except Unreachable:
                if asked:
                    raise ConnectionResetError("while it was asked") from None
                raise
            return await self._post(link, connection, body)

    async def _post(self, link: _Link, connection: Connection, body: bytes) -> Answer:
        answer = await connection.post(GENERATE, link.headers, body)
        link.free.append(connection)
        return answer


def _answered(at: str, request: Request, answer: Answer) -> Answered:
    """at: server and route, for an error's line. Raises ServerLost where another server may do better."""
    if answer.status != 200:
        refusal = refusal_of(answer.status, answer.body.tobytes())
        if refusal == ENGINE_DIED:
            raise ServerLost(f"{at}: {refusal}")
        return Answered(request, [], RolloutError(f"{at}: {refusal}"))
    try:
        return Answered(request, responses_of(answer.body.data, request.prompts, request.n))
    except CutOff as error:
        raise ServerLost(f"{at}: {error}") from None
    except Exception as error:  # whatever its bytes make of decode(): the caller waits for a word
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return Answered(request, [], RolloutError(f"{at}: its answer cannot be read ({what})"))


def wait_for(requests: Sequence[Request]) -> list[Answered]:
    """Every request's answer, in order, from the queue that all of them share. Raises the first error."""
    answers: dict[Request, Answered] = {}
    while len(answers) < len(requests):
        answered = requests[0].done.get()
        if answered.error:
            raise answered.error
        answers[answered.request] = answered
    return [answers[request] for request in requests]


def take(done: SimpleQueue[Answered], wait_s: float) -> list[Answered]:
    """What has come: at least one, unless nothing comes within wait_s."""
    taken: list[Answered] = []
    with contextlib.suppress(Empty):
        taken.append(done.get(timeout=wait_s) if wait_s else done.get_nowait())
        while True:
            taken.append(done.get_nowait())
    return taken
