"""How trainer ranks talk to the vLLM servers: token ids in, token ids,
log-probabilities and routes out. Imports no engine.
"""

from __future__ import annotations

import errno
import http.client
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from megarl.addresses import watch
from megarl.door import header
from megarl.rollout.dispatch import Answered, Dispatcher, Request, wait_for
from megarl.rollout.patience import ANSWER_S, STALE_S
from megarl.rollout.registry import NoServers, RolloutError, ServerLost, ServerSilent, WorkerInfo
from megarl.rollout.response import Response
from megarl.rollout.wire import ENGINE_DIED, decode, refusal_of


class Server:
    """One server behind one kept-alive connection. Not for several threads at once."""

    def __init__(self, url: str, timeout_s: float, token: str) -> None:
        self.url = url
        self._headers = header(token)
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def post(self, path: str, body: dict[str, Any], timeout_s: float | None = None) -> bytes:
        """The answer's bytes. Raises RolloutError for any status but 200, a broken
        connection, or after the time limit.
        """
        timeout_s = timeout_s or self._timeout_s
        data = json.dumps(body, separators=(",", ":")).encode()
        for fresh in (self._connection is None, True):
            begun, start = False, time.monotonic()
            try:
                connection = self._connect(timeout_s)
                connection.request("POST", path, data, self._headers)
                answer = connection.getresponse()
                begun = True
                content = answer.read()
                break
            except TimeoutError as error:
                self.close()
                if error.errno == errno.ETIMEDOUT:  # the kernel's word, long before the limit
                    raise ServerLost(f"rollout server {self.url}{path}: its host does not answer") from None
                raise ServerSilent(f"rollout server {self.url}{path}: no answer within {timeout_s:.0f} s") from None
            except (OSError, http.client.HTTPException) as error:
                self.close()
                # A server closes what was idle for some seconds, also while a request is on its way to it, unread. One
                # that has begun to answer, or had the time to work, has read it: no step of a sync may come twice.
                unread = not begun and time.monotonic() - start < STALE_S
                if fresh or not unread or not isinstance(error, (ConnectionResetError, BrokenPipeError)):
                    raise ServerLost(
                        f"rollout server {self.url}{path}: connection lost ({type(error).__name__})"
                    ) from None
        if answer.status != 200:
            message = refusal_of(answer.status, content)
            kind = ServerLost if message == ENGINE_DIED else RolloutError
            raise kind(f"rollout server {self.url}{path}: {message}")
        return content

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        if self._connection is None:
            parts = urlsplit(self.url)
            self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
            self._connection.connect()
            watch(self._connection.sock)
        self._connection.sock.settimeout(timeout_s)
        return self._connection


class RolloutClient:
    """Spreads prompts over the servers of `workers`. Its methods wait for the answers.

    at_once: of the Dispatcher, which also takes what nobody waits for.
    """

    def __init__(self, workers: list[WorkerInfo], timeout_s: float, at_once: int = 0) -> None:
        self.dispatcher = Dispatcher(workers, timeout_s, at_once)
        self._timeout_s = timeout_s
        self.servers: list[Server] = []
        self.set_workers(workers)

    def set_workers(self, workers: list[WorkerInfo]) -> None:
        """Whom to ask from now on."""
        for server in self.servers:
            server.close()
        self.servers = [Server(worker.url, self._timeout_s, worker.tokens.data) for worker in workers]
        self.dispatcher.set_servers(workers)

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        temperature: float,
        max_new_tokens: int,
        stop_token_ids: list[int],
        seed: int | None = None,
        first: int = 0,
        total: int | None = None,
    ) -> list[list[Response]]:
        """`n` responses for each prompt, in the order of `prompts`. A
        stop token that was sampled is part of its response.

        first, total: these are the prompts [first, first + len(prompts)) of a batch of `total`, whose others are asked
        for elsewhere; None: nothing comes after them. The batch is split over the servers, not each rank's share of it:
        as many ranks as servers have one each.

        Every sampling parameter is sent: mu is the whole softmax at `temperature`. `seed` makes the draw repeatable
        (response i of prompt p draws from seed + p n + i), at some cost in speed. One request a server: what a server
        samples together depends on nothing but the prompts, where other ranks ask at the same time.
        """
        if not prompts:
            return []
        if not self.servers:
            raise NoServers("no rollout server is left")
        sampling, done = sampling_of(n, temperature, max_new_tokens, stop_token_ids), SimpleQueue[Answered]()
        requests = []
        total = first + len(prompts) if total is None else total
        shares = np.array_split(np.arange(total) - first, len(self.servers))
        for server, share in zip(self.servers, shares, strict=True):
            chunk = [int(i) for i in share if 0 <= i < len(prompts)]
            seeds = None if seed is None else [seed + i * n for i in chunk]
            if chunk:
                requests.append(Request([prompts[i] for i in chunk], n, sampling, seeds, done, server.url))
        for request in requests:
            self.dispatcher.submit(request)
        try:
            return [group for answered in wait_for(requests) for group in answered.groups]
        except BaseException:  # an error, or a signal that ends the wait
            self.dispatcher.abandon(requests)
            raise

    def score(self, tokens: list[int], server: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
        """Teacher-forced at temperature 1: log-probabilities float32
        [T-1] (entry i scores token i+1), that pass's routes [T-1, L, K].
        """
        _, arrays = decode(self.servers[server].post("/megarl/score", {"tokens": tokens}))
        return arrays["logprobs"], arrays.get("routes")

    def weight_versions(self) -> list[int]:
        """The version each server holds, in optimizer steps; 0 before the first sync."""
        answers = [server.post("/megarl/sync/version", {}) for server in self.servers]
        return [int(json.loads(answer)["version"]) for answer in answers]

    def close(self) -> None:
        for server in self.servers:
            server.close()
        self.dispatcher.close()


def sampling_of(n: int, temperature: float, max_new_tokens: int, stop_token_ids: list[int]) -> dict[str, Any]:
    """What a request asks of vLLM, every parameter named."""
    return {
        "n": n,
        "temperature": temperature,
        "max_tokens": max_new_tokens,
        "stop_token_ids": stop_token_ids,
        "ignore_eos": True,  # only the stop tokens named here stop a response
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
    }


def answering(workers: Sequence[WorkerInfo]) -> list[WorkerInfo]:
    """Those that say within ANSWER_S which weights they hold: their engines are asked for it."""

    def answers(worker: WorkerInfo) -> bool:
        server = Server(worker.url, ANSWER_S, worker.tokens.control)
        try:
            server.post("/megarl/sync/version", {})
        except RolloutError:
            return False
        finally:
            server.close()
        return True

    if not workers:
        return []
    with ThreadPoolExecutor(len(workers), "answering") as pool:
        return [worker for worker, good in zip(workers, pool.map(answers, workers), strict=True) if good]


def let_go(worker: WorkerInfo) -> bool:
    """Tells a server that no sync will end the pause it may be in. False where it is still at a step of the last one;
    one that is lost has nothing to go on with.
    """
    server = Server(worker.url, ANSWER_S, worker.tokens.control)
    try:
        server.post("/megarl/sync/resume", {})
    except ServerLost:
        return True
    except RolloutError:
        return False
    finally:
        server.close()
    return True
