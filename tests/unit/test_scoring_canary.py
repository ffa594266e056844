"""The canary as servers answer it: all answers are taken, also where one of them is lost, and a part of one is none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from megarl.door import Tokens
from megarl.rollout.registry import RolloutError, WorkerInfo
from megarl.rollout.sync_leader import Scoring
from megarl.rollout.wire import encode

CANARY = [3, 4, 5, 6]


@dataclass
class Scorer:
    """A server that gives so many log-probabilities; none: it ends the connection."""

    worker: WorkerInfo
    server: ThreadingHTTPServer


def scorer(index: int, count: int | None) -> Scorer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if count is None:
                self.close_connection = True
                return
            body = encode({"version": 1}, {"logprobs": np.zeros(count, np.float32)})
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return Scorer(WorkerInfo(index, url, 1, 0, "here", "", Tokens("", "")), server)


@pytest.fixture
def scorers(request: pytest.FixtureRequest) -> Iterator[list[Scorer]]:
    made = [scorer(index, count) for index, count in enumerate(request.param)]
    with ThreadPoolExecutor(len(made)) as pool:
        for each in made:
            pool.submit(each.server.serve_forever, 0.05)
        yield made
        for each in made:
            each.server.shutdown()
            each.server.server_close()


@pytest.mark.parametrize(
    ("scorers", "fault"), [([None, 3], "connection lost"), ([2, 3], "2 log-prob")], indirect=["scorers"]
)
def test_who_answered_is_known_where_another_did_not(scorers: list[Scorer], fault: str) -> None:
    bad, good = (each.worker for each in scorers)
    scoring = Scoring([bad, good], CANARY, timeout_s=20)
    deadline = time.monotonic() + 20
    while not scoring.answered() and time.monotonic() < deadline:  # nobody has asked for the scores
        time.sleep(0.01)
    assert [url for url, _ in scoring.answered()] == [good.url]
    with pytest.raises(RolloutError, match=f"{bad.url}.*{fault}"):
        scoring.scores(lambda: [bad.url, good.url])
    assert [url for url, _ in scoring.answered()] == [good.url]
