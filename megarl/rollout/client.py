"""How trainer ranks talk to the vLLM servers: token ids in, token ids,
log-probabilities and routes out. Imports no engine.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from megarl.door import header
from megarl.errors import UserError
from megarl.rollout.registry import WorkerInfo
from megarl.rollout.response import Response
from megarl.rollout.wire import decode

T = TypeVar("T")


class RolloutError(UserError):
    """A rollout server refused a request, or the connection to it broke. One line that names the server."""


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
            try:
                connection = self._connect(timeout_s)
                connection.request("POST", path, data, self._headers)
                answer = connection.getresponse()
                content = answer.read()
                break
            except TimeoutError:
                self.close()
                raise RolloutError(f"rollout server {self.url}{path}: no answer within {timeout_s:.0f} s") from None
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if fresh or not isinstance(error, (http.client.RemoteDisconnected, BrokenPipeError)):
                    raise RolloutError(
                        f"rollout server {self.url}{path}: connection lost ({type(error).__name__})"
                    ) from None
        if answer.status != 200:
            raise RolloutError(f"rollout server {self.url}{path}: {_message(answer.status, content)}")
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
        self._connection.sock.settimeout(timeout_s)
        return self._connection


class RolloutClient:
    """Spreads prompts over the servers of `workers`; each request is one batch of prompts. Synchronous."""

    def __init__(self, workers: list[WorkerInfo], timeout_s: float) -> None:
        self.servers = [Server(worker.url, timeout_s, worker.tokens.data) for worker in workers]
        self._pool = ThreadPoolExecutor(len(workers), "rollout") if len(workers) > 1 else None

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        temperature: float,
        max_new_tokens: int,
        stop_token_ids: list[int],
        seed: int | None = None,
    ) -> list[list[Response]]:
        """`n` responses for each prompt, in the order of `prompts`. A
        stop token that was sampled is part of its response.

        Every sampling parameter is sent: mu is the whole softmax at `temperature`. `seed` makes the draw repeatable
        (response i of prompt p draws from seed + p n + i), at some cost in speed.
        """
        chunks = np.array_split(np.arange(len(prompts)), len(self.servers))
        sampling = _sampling(n, temperature, max_new_tokens, stop_token_ids)

        def one(server: Server, chunk: np.ndarray) -> list[list[Response]]:
            if not len(chunk):
                return []
            batch = [prompts[i] for i in chunk]
            seeds = None if seed is None else [seed + int(i) * n for i in chunk]
            return _responses(
                server.post("/megarl/generate", {"prompts": batch, "sampling": sampling, "seeds": seeds}), batch, n
            )

        return [group for part in self._on_all(lambda i: one(self.servers[i], chunks[i])) for group in part]

    def score(self, tokens: list[int], server: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
        """Teacher-forced at temperature 1: log-probabilities float32
        [T-1] (entry i scores token i+1), that pass's routes [T-1, L, K].
        """
        _, arrays = decode(self.servers[server].post("/megarl/score", {"tokens": tokens}))
        return arrays["logprobs"], arrays.get("routes")

    def weight_versions(self) -> list[int]:
        """The version each server holds, in optimizer steps; 0 before the first sync."""
        return self._on_all(lambda i: int(json.loads(self.servers[i].post("/megarl/sync/version", {}))["version"]))

    def close(self) -> None:
        for server in self.servers:
            server.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _on_all(self, call: Callable[[int], T]) -> list[T]:
        indices = range(len(self.servers))
        return [call(0)] if self._pool is None else list(self._pool.map(call, indices))


def _sampling(n: int, temperature: float, max_new_tokens: int, stop_token_ids: list[int]) -> dict[str, Any]:
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


def _responses(body: bytes, prompts: list[list[int]], n: int) -> list[list[Response]]:
    header, arrays = decode(body)
    routes = arrays.get("routes")
    groups: list[list[Response]] = []
    at = row = number = 0
    for prompt in prompts:
        head = np.array(prompt, np.int32)
        group = []
        for _ in range(n):
            length = header["lengths"][number]
            rows = len(prompt) + length - 1
            spans = [
                {"version": version, "start": start, "end": end} for version, start, end in header["versions"][number]
            ]
            group.append(
                Response(
                    tokens=np.concatenate([head, arrays["tokens"][at : at + length]]),
                    prompt_len=len(prompt),
                    logprobs=arrays["logprobs"][at : at + length],
                    routes=None if routes is None else routes[row : row + rows],
                    weight_versions=spans,
                    finish_reason=header["finish"][number],
                )
            )
            at, row, number = at + length, row + rows, number + 1
        groups.append(group)
    return groups


def _message(status: int, content: bytes) -> str:
    try:
        return json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return f"status {status}: {content[:200].decode(errors='replace')}"
