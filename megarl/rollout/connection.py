"""One kept-alive HTTP/1.1 connection on an asyncio loop, whose answers are received into memory of their own.

http.client and httpx read an answer in parts and join them. Routes are megabytes a response, so here the kernel writes
the body where it stays: asyncio.BufferedProtocol hands out that buffer. Only what our endpoint sends is understood: a
status, and a body whose length is known.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

from megarl.addresses import watch

HEAD_BYTES = 2**16  # most that a status line and its header lines may take
CONNECT_S = 10.0
READ_BYTES = 2**17  # at most at once: hundreds of answers come together, and no one may hold up the loop


class Unreachable(OSError):
    """Nobody was reached, or the peer's host is silent: no doing of what was asked."""


@dataclass(frozen=True)
class Answer:
    """body: uint8 [bytes], nobody else's."""

    status: int
    body: np.ndarray


class Connection(asyncio.BufferedProtocol):
    """One request at a time. Broken for good after a ConnectionError, or when a post() was cancelled."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._head, self._filled, self._status = bytearray(HEAD_BYTES), 0, 0
        self._body: np.ndarray | None = None

    @classmethod
    async def open(cls, url: str) -> Connection:
        """Unreachable where nothing answers."""
        parts = urlsplit(url)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(cls, parts.hostname or "", parts.port or 0)
        except TimeoutError:
            raise Unreachable(f"no connection within {CONNECT_S:.0f} s") from None
        except OSError as error:
            raise Unreachable(f"no connection ({type(error).__name__})") from None
        return connection

    async def post(self, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """ConnectionError where the connection breaks, or brings what is no answer of ours; Unreachable where the
        kernel gives the host up.
        """
        self._filled, self._status, self._body = 0, 0, None
        if self._transport is None or self.closed:
            raise ConnectionResetError("closed by the server")
        lines = [f"POST {path} HTTP/1.1", "Host: megarl", f"Content-Length: {len(body)}"]
        head = "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""])
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(head.encode() + body)
        try:
            return await self._answer
        except asyncio.CancelledError:
            self.close()  # the server sees that nobody waits and drops the work
            raise
        finally:
            self._answer = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    @property
    def _waiting(self) -> bool:
        return self._answer is not None and not self._answer.done()

    @property
    def begun(self) -> bool:
        """Whether a part of the answer has come."""
        return self._filled > 0 or self._body is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        watch(transport.get_extra_info("socket"))

    def get_buffer(self, sizehint: int) -> memoryview:
        if not self._waiting:  # the server's end, most likely; asyncio wants room all the same
            return memoryview(self._head)
        target = memoryview(self._head) if self._body is None else self._body.data
        return target[self._filled : self._filled + READ_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        if not self._waiting:
            self.close()  # nobody has asked for this
            return
        self._filled += nbytes
        if self._body is None:
            end = self._head.find(b"\r\n\r\n", 0, self._filled)
            if end < 0:
                if self._filled == HEAD_BYTES:
                    self._fail(ConnectionError("a header without end"))
                return
            if not self._read_head(end):
                return
        assert self._body is not None
        if self._filled == len(self._body) and self._answer is not None:
            self._answer.set_result(Answer(self._status, self._body))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, OSError) and not isinstance(exc, ConnectionError):  # ETIMEDOUT, EHOSTUNREACH ...
            self._fail(Unreachable(f"host is silent ({exc.strerror})"))
            return
        self._fail(ConnectionResetError(str(exc) if exc else "closed by the server"))

    def _read_head(self, end: int) -> bool:
        """Makes room for the body, and moves there what came with the header."""
        status, *lines = bytes(self._head[:end]).decode("latin-1").split("\r\n")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        words, length = status.split(), fields.get("content-length", "")
        if len(words) < 2 or not words[1].isdigit() or not length.isdigit():
            self._fail(ConnectionError(f"no answer of a rollout server: {status[:80]!r}"))
            return False
        self._status, self._body = int(words[1]), np.empty(int(length), np.uint8)
        rest = self._head[end + 4 : self._filled]
        if len(rest) > len(self._body):
            self._fail(ConnectionError("more came than the answer's length"))
            return False
        self._body[: len(rest)] = np.frombuffer(rest, np.uint8)
        self._filled = len(rest)
        return True

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self.close()
