from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from megarl.rollout.client import Server
from megarl.rollout.registry import RolloutError, ServerLost
from megarl.rollout.response import CutOff, responses_of
from megarl.rollout.wire import JOINED, SMALL, decode, encode, encode_parts


def test_arrays_come_back_as_they_were() -> None:
    arrays = {
        "tokens": np.arange(5, dtype=np.int32),
        "logprobs": np.array([-0.1, -np.inf], np.float32),
        "routes": np.arange(24, dtype=np.uint16).reshape(3, 4, 2)[:, ::2],
        "none": np.empty((0, 4, 2), np.uint8),
    }
    header, found = decode(encode({"version": 3, "finish": ["stop"]}, arrays))
    assert header == {"version": 3, "finish": ["stop"]}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(ValueError):
        decode(encode({}, arrays)[:-60])


def test_a_body_of_small_and_large_pieces_is_sent_in_few_parts() -> None:
    sizes = [3, SMALL, 5, 7, 2 * SMALL, SMALL, 0, 1, *[SMALL // 2] * 33]
    pieces = [np.full(size, number, np.uint8) for number, size in enumerate(sizes)]
    parts = encode_parts({"version": 3}, {"routes": pieces})
    assert [len(part) for part in parts[1:]] == [SMALL, 12, 2 * SMALL, SMALL, JOINED + 1, SMALL // 2]
    header, found = decode(b"".join(parts))
    assert header == {"version": 3}
    np.testing.assert_array_equal(found["routes"], np.concatenate(pieces))


def test_a_body_is_cut_into_responses_of_their_own_lengths() -> None:
    prompts, lengths = [[3, 4], [5, 6, 7]], [1, 3, 2, 4]
    rows = [2 + 1 - 1, 2 + 3 - 1, 3 + 2 - 1, 3 + 4 - 1]
    header = {
        "lengths": lengths,
        "finish": ["stop", "length", "length", "stop"],
        "versions": [[[7, 0, n]] for n in lengths],
    }
    routes = np.repeat(np.arange(4, dtype=np.uint8), rows)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    arrays = {"tokens": np.arange(10, dtype=np.int32), "logprobs": -np.arange(10, dtype=np.float32), "routes": routes}
    groups = responses_of(encode(header, arrays), prompts, 2)
    assert [r.tokens.tolist() for group in groups for r in group] == [
        [3, 4, 0],
        [3, 4, 1, 2, 3],
        [5, 6, 7, 4, 5],
        [5, 6, 7, 6, 7, 8, 9],
    ]
    for number, response in enumerate(r for group in groups for r in group):
        assert (
            response.routes is not None
            and len(response.routes) == len(response.tokens) - 1
            and (response.routes == number).all()
        )
        assert response.weight_versions == [{"version": 7, "start": 0, "end": lengths[number]}]
        assert response.logprobs.tolist() == (-response.tokens[response.prompt_len :]).tolist()


@pytest.mark.parametrize(
    ("finish", "spans", "says"),
    [
        ("abort", [[7, 0, 3]], "a response of 3 tokens that ended by 'abort', not stop or length"),
        (None, [[7, 0, 3]], "ended by None"),
        ("stop", [], "versions of the weights"),
        ("stop", [[7, 0, 2]], "versions of the weights"),
        ("stop", [[7, 1, 3]], "versions of the weights"),
        ("stop", [[7, 0, 1], [8, 2, 3]], "versions of the weights"),
        ("length", [[7, 0, 1], [8, 1, 3]], None),
    ],
)
def test_a_response_that_was_cut_off_is_none(finish: str | None, spans: list[list[int]], says: str | None) -> None:
    """A server that gets SIGTERM answers with what it has sampled."""
    arrays = {"tokens": np.zeros(5, np.int32), "logprobs": np.zeros(5, np.float32)}
    header = {"lengths": [2, 3], "finish": ["stop", finish], "versions": [[[7, 0, 2]], spans]}
    with pytest.raises(CutOff, match=says) if says else nullcontext():
        responses_of(encode(header, arrays), [[3, 4]], 2)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        type(self).served += 1
        self.send_response(500 if self.path == "/bad" else 200)
        body = b'{"error": "no such thing"}' if self.path == "/bad" else b"fine"
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.path == "/last"

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_one_connection_serves_and_is_made_again_when_the_server_closed_it(url: str) -> None:
    server = Server(url, timeout_s=5, token="")
    for path in ("/one", "/last", "/two", "/three"):
        assert server.post(path, {}) == b"fine"
    with pytest.raises(RolloutError, match=rf"^rollout server {url}/bad: no such thing$"):
        server.post("/bad", {})
    server.close()


def test_a_host_that_is_gone_is_noticed_by_the_kernel(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word in a sync, and long before sync.timeout_s; it is then not called silent: nothing must be asked."""
    server = Server(url, timeout_s=600, token="")
    server.post("/one", {})
    assert server._connection is not None
    sock = server._connection.sock
    assert 0 < sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 60_000
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    def gone(*_: object) -> None:
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr(server._connection, "request", gone)
    with pytest.raises(ServerLost, match=rf"^rollout server {url}/two: its host does not answer$"):
        server.post("/two", {})
