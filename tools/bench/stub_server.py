"""A rollout server without a model, for tests and benches of the trainer's side: it answers /megarl/generate as
megarl/server/endpoints.py does, over the same bytes.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from megarl.rollout.registry import WorkerInfo
from megarl.rollout.wire import encode_parts

Reply = Callable[[dict[str, Any]], Awaitable[tuple[int, list[bytes | memoryview]]]]


class StubServer:
    """Listens on a free port of loopback until close(); a thread of its own. reply: the answer to a request's body.

    served: requests with an answer, counted before its first byte goes out: who has read an answer finds it counted.
    connections: open ones.
    """

    def __init__(self, reply: Reply, host: str = "127.0.0.1", port: int = 0) -> None:
        self.reply, self.served = reply, 0
        self.connections: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stub", daemon=True)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, host, port), self._loop)
        self._server = started.result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://{host}:{self.port}"

    def info(self, index: int = 0) -> WorkerInfo:
        return WorkerInfo(index, self.url, 1, 0, "", "")

    def close(self) -> None:
        """All connections break, as where the process is killed."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    async def _close(self) -> None:
        self._server.close()
        for _ in range(10):  # some may be accepted and not begun
            for writer in self.connections:
                writer.transport.abort()
            await asyncio.sleep(0.005)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
                reply = asyncio.ensure_future(self.reply(json.loads(await reader.readexactly(length))))
                gone = asyncio.ensure_future(reader.read(1))  # nothing comes before the answer but the caller's end
                await asyncio.wait((reply, gone), return_when=asyncio.FIRST_COMPLETED)
                if not reply.done():
                    reply.cancel()
                    return
                gone.cancel()
                await asyncio.wait((gone,))
                status, parts = reply.result()
                size = sum(len(part) for part in parts)
                self.served += 1
                writer.write(f"HTTP/1.1 {status} OK\r\ncontent-length: {size}\r\n\r\n".encode())
                for part in parts:
                    writer.write(part)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.connections.discard(writer)
            writer.close()


def generated(
    request: dict[str, Any],
    tokens: int,
    routes: tuple[int, int] | None = None,
    version: int = 0,
    finish: str = "stop",
) -> list[bytes | memoryview]:
    """The body for `tokens` tokens a response: of response i all are the request's seed + i. routes: layers and K."""
    n, prompts = request["sampling"]["n"], request["prompts"]
    seeds = request["seeds"] or [0] * len(prompts)
    count = n * len(prompts)
    header = {
        "lengths": [tokens] * count,
        "cached": [0] * len(prompts),
        "finish": [finish] * count,
        "versions": [[[version, 0, tokens]]] * count,
    }
    arrays: dict[str, list[np.ndarray]] = {
        "tokens": [np.full(tokens, seed + i, np.int32) for seed in seeds for i in range(n)],
        "logprobs": [np.zeros(tokens, np.float32)] * count,
    }
    if routes is not None:
        row = np.arange(routes[1], dtype=np.uint8)
        arrays["routes"] = [
            np.broadcast_to(row, (len(prompt) + tokens - 1, *routes)) for prompt in prompts for _ in range(n)
        ]
    return encode_parts(header, arrays)
