"""A connection that is kept alive: the server may close it at the moment when the next request is on its way."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from megarl.rollout.client import Server
from megarl.rollout.registry import ServerLost

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
REFUSE = struct.pack("ii", 1, 0)  # of SO_LINGER: close() resets the connection


class Peer:
    """Answers as `script` says, one word a request: "ok", "reset", "close" or, of an answer, "half"; after the last
    three comes another connection.
    """

    def __init__(self, script: list[str]) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, args=[list(script)])
        self._thread.start()

    def _serve(self, script: list[str]) -> None:
        while script:
            self._listening.settimeout(20)
            connection, _ = self._listening.accept()
            connection.settimeout(20)
            with connection:
                while script:
                    content = b""
                    while not content.endswith(b"{}"):
                        content += connection.recv(4096)
                    word = script.pop(0)
                    if word == "ok":
                        connection.sendall(ANSWER)
                        continue
                    if word == "half":
                        connection.sendall(ANSWER[:-1])
                        time.sleep(1.0)  # what is read is kept, whatever follows
                    if word != "close":
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, REFUSE)
                    break

    def close(self) -> None:
        self._thread.join(30)
        self._listening.close()


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    peer = Peer(request.param)
    yield peer
    peer.close()


@pytest.mark.parametrize("peer", [["ok", "reset", "ok"], ["ok", "close", "ok"]], indirect=True, ids=["reset", "closed"])
def test_a_request_that_meets_the_end_of_an_idle_connection_goes_out_again(peer: Peer) -> None:
    server = Server(peer.url, 20, "")
    assert server.post("/megarl/sync/load", {}) == b"ok" and server.post("/megarl/sync/load", {}) == b"ok"
    server.close()


@pytest.mark.parametrize("peer", [["reset"], ["ok", "reset", "reset"]], indirect=True, ids=["first", "again"])
def test_a_new_connection_that_breaks_is_a_lost_server(peer: Peer) -> None:
    server = Server(peer.url, 20, "")
    with pytest.raises(ServerLost, match="connection lost"):
        for _ in range(2):
            server.post("/megarl/sync/load", {})


@pytest.mark.parametrize("peer", [["ok", "half"]], indirect=True)
def test_what_a_server_has_begun_to_answer_is_not_asked_again(peer: Peer) -> None:
    """It would do a step of a sync twice."""
    server = Server(peer.url, 20, "")
    server.post("/megarl/sync/load", {})
    with pytest.raises(ServerLost, match="connection lost"):
        server.post("/megarl/sync/load", {})
