"""`megarl rollout` with a stub in vLLM's place and a real store: restarts, a lost store, a drain, an end at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megarl.config import load_config
from megarl.errors import UserError
from megarl.launch.ports import reserve_port
from megarl.launch.stop import TWICE_S
from megarl.rollout import registry
from megarl.rollout.members import Members, Seen
from megarl.rollout.registry import WorkerInfo
from megarl.server import worker as module
from megarl.server.store_link import StoreLink, StoreLost, bounded

STUB = """
import http.server, json, os, sys
class Stub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"running": int(os.path.exists("busy"))}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer((sys.argv[1], int(sys.argv[2])), Stub).serve_forever()
"""
WORKER = """
import sys
from pathlib import Path
from megarl.config import load_config
from megarl.server import supervise, worker
supervise.server_command = lambda config, here, port: [sys.executable, "-c", {stub!r}, here, str(port)]
worker.HUNG_S, worker.NOTICED_S = 2.0, 0.5
sys.exit(worker.run_rollout(load_config(None, sys.argv[2:]), "127.0.0.1", int(sys.argv[1]), Path("logs")))
"""


class Started:
    def __init__(self, folder: Path, port: int, *keys: str) -> None:
        self.folder = folder
        command = [sys.executable, "-c", WORKER.format(stub=STUB), str(port), "launch.max_restarts=1", *keys]
        with (folder / "err").open("w") as err:
            self.popen = subprocess.Popen(command, cwd=folder, env={**os.environ}, stderr=err)

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 90
        while not (found := condition()):
            assert self.popen.poll() is None and time.monotonic() < deadline, self.err
            time.sleep(0.05)
        return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def start(port: int, *keys: str) -> Started:
        started.append(Started(tmp_path, port, *keys))
        return started[-1]

    yield start
    for one in started:
        one.popen.kill()
        one.popen.wait()


def store_at(port: int) -> dist.TCPStore:
    return registry.open_store("127.0.0.1", port, is_master=True, timeout_s=5)


def numbers(seen: Seen) -> list[int]:
    return [worker.index for worker in seen.here]


def test_a_server_that_dies_or_hangs_comes_back_and_a_signal_drains(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    """One worker: its server killed, then (that was the one restart) stopped; and another that leaves when idle."""
    store = store_at(0)
    looks, worker = Members(store), start(store.port)
    [first] = worker.until(lambda: looks.look().here)
    os.kill(first.pid, signal.SIGKILL)
    [second] = worker.until(lambda: numbers(looks.look()) == [1] and looks.look().here)
    assert second.url != first.url and Path(tmp_path / second.log).is_file()
    assert looks.look().gone == {
        0: f"rollout worker 0 (pid {first.pid} on {first.host}): the vLLM server ended with status -9; its log is "
        f"{first.log}"
    }
    assert worker.err.startswith("megarl: the server is started again in 1 s: rollout worker 0 (pid ")
    os.kill(second.pid, signal.SIGSTOP)
    assert worker.popen.wait(90) == 1
    assert "the vLLM server has not answered for" in looks.look().gone[1]
    assert worker.err.count("megarl: error: ") == 1 and "megarl: error: rollout worker 1 (pid " in worker.err

    (tmp_path / "busy").touch()
    worker = start(store.port)
    worker.until(lambda: numbers(looks.look()) == [2])
    worker.popen.send_signal(signal.SIGTERM)
    worker.until(lambda: looks.look().leaving == {2})
    time.sleep(2.0)
    assert worker.popen.poll() is None, "its server has a request at work"
    (tmp_path / "busy").unlink()
    assert worker.popen.wait(90) == 0
    assert looks.look().gone[2] == ""

    worker = start(store.port)
    worker.until(lambda: numbers(looks.look()) == [3])
    worker.popen.send_signal(signal.SIGINT)
    assert worker.popen.wait(90) == 128 + signal.SIGINT
    assert looks.look().gone[3] == "", "nobody waits for its silence"


def test_a_store_that_comes_back_gets_the_same_server(start: Callable[..., Started], tmp_path: Path) -> None:
    """Trainers that are started again open a new store; then the store is lost for good, and a signal still ends it."""
    port = reserve_port("127.0.0.1")
    holder = (
        "import sys, time; from megarl.rollout import registry; "
        "store = registry.open_store('127.0.0.1', int(sys.argv[1]), True, 5); time.sleep(600)"
    )
    first = subprocess.Popen([sys.executable, "-c", holder, str(port)])
    worker = start(port, "rollout.start_timeout_s=300")
    link = StoreLink("127.0.0.1", port)
    worker.until(link.connect)
    looks = worker.until(lambda: link.call(Members))
    [before] = worker.until(lambda: looks.look().here)
    first.kill()
    first.wait()
    worker.until(lambda: "is gone; it may come back for 300 s" in worker.err)
    with pytest.raises(StoreLost, match=f"^the run's store 127.0.0.1:{port} is gone$"):
        link.call(registry.claimed)
    store = store_at(port)
    [after] = worker.until(lambda: Members(store).look().here)
    assert (after.url, after.pid) == (before.url, before.pid)
    assert (before.back, after.back) == (False, True)
    worker.popen.send_signal(signal.SIGTERM)
    worker.popen.send_signal(signal.SIGINT)  # it does not wait for the drain
    assert worker.popen.wait(60) == 128 + signal.SIGINT, worker.err


def test_a_second_sigterm_is_meant_a_second_after_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm signals the worker, and who started it passes its own on."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    worker = module._Worker(load_config(None, []), "127.0.0.1", 1, tmp_path)
    worker.serves = True
    worker.take(signal.SIGTERM, None)
    worker.take(signal.SIGTERM, None)
    assert worker.leaving
    now[0] += TWICE_S
    with pytest.raises(module._Stopped):
        worker.take(signal.SIGTERM, None)


def test_another_signal_while_the_first_one_ends_it_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at once ended it in a traceback."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    worker = module._Worker(load_config(None, []), "127.0.0.1", 1, tmp_path)
    with pytest.raises(module._Stopped):
        worker.take(signal.SIGINT, None)
    worker.take(signal.SIGTERM, None)
    now[0] += TWICE_S
    with pytest.raises(module._Stopped):
        worker.take(signal.SIGTERM, None)


def test_a_server_whose_store_goes_while_it_registers_registers_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = module._Worker(load_config(None, ["rollout.start_timeout_s=60"]), "127.0.0.1", 1, tmp_path)
    answers: list[Any] = [{}, 5, StoreLost("gone"), {}, 6, None, None, True]
    asked: list[str] = []

    def call(function: Any, *_: Any) -> Any:
        asked.append(function.__name__)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    worker._link = SimpleNamespace(connect=lambda: True, call=call, host="", port=0)  # type: ignore[assignment]
    monkeypatch.setattr(module, "healthy", lambda url: True)
    monkeypatch.setattr(module, "Probe", lambda info: SimpleNamespace(silent_s=0.0, running=0, close=lambda: None))
    monkeypatch.setattr(module, "stop_server", lambda child: None)
    (tmp_path / "log").touch()
    worker._child = SimpleNamespace(poll=lambda: None)
    worker._attend(WorkerInfo(-1, "http://127.0.0.1:1", 1, 7, "here", str(tmp_path / "log")))
    assert asked.count("register_worker") == 2 and not answers
    assert worker._known_as == 6


def test_a_number_of_a_lost_store_is_told_to_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next store numbers anew, and refuses this worker, say: whoever has its old number there is not gone."""
    worker = module._Worker(load_config(None, ["rollout.start_timeout_s=60"]), "127.0.0.1", 1, tmp_path)
    answers: list[Any] = [{}, 1, None, StoreLost("gone"), {"vllm": "another"}, UserError("refused")]
    monkeypatch.setattr(module, "facts", lambda config: {})
    told: list[str] = []

    def call(function: Any, *_: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    worker._link = SimpleNamespace(  # type: ignore[assignment]
        connect=lambda: True, call=call, call_within=lambda *given: told.append(given[1].__name__), host="", port=0
    )
    monkeypatch.setattr(module, "healthy", lambda url: True)
    monkeypatch.setattr(module, "Probe", lambda info: SimpleNamespace(silent_s=0.0, running=0, close=lambda: None))
    (tmp_path / "log").touch()
    worker._child = SimpleNamespace(poll=lambda: None)
    with pytest.raises(UserError, match="refused"):
        worker._attend(WorkerInfo(-1, "http://127.0.0.1:1", 1, 7, "here", str(tmp_path / "log")))
    worker.say_gone()
    assert not told and not answers


def test_a_server_that_fails_together_with_the_store_is_started_again(tmp_path: Path) -> None:
    """The trainers were killed: in the middle of a worker's joining, and before it could tell of its server."""
    worker = module._Worker(load_config(None, ["rollout.start_timeout_s=60"]), "127.0.0.1", 1, tmp_path)
    answers: list[Any] = [StoreLost("gone"), {}, 5, StoreLost("gone")]

    def call(*_: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    worker._link = SimpleNamespace(connect=lambda: True, call=call, host="", port=0)  # type: ignore[assignment]
    (tmp_path / "log").touch()
    worker._child, worker._answered = SimpleNamespace(poll=lambda: None), True
    info = WorkerInfo(0, "http://127.0.0.1:1", 1, 7, "here", str(tmp_path / "log"))
    assert worker._join(info).index == 5
    with pytest.raises(module._Failed, match="the vLLM server ended") as failed:
        worker._fail(info, "ended with status -9")
    assert failed.value.wait_s == 1.0 and not answers


def test_a_worker_without_a_store_says_once_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a mistyped launch.store it was silent for all of rollout.start_timeout_s."""
    monkeypatch.setattr(module, "TELLS_S", 0.0)
    worker = module._Worker(load_config(None, ["rollout.start_timeout_s=1"]), "trainers", 29600, tmp_path)
    worker._link = SimpleNamespace(connect=lambda: False, host="trainers", port=29600)  # type: ignore[assignment]
    worker._child = SimpleNamespace(poll=lambda: None)  # type: ignore[assignment]
    with pytest.raises(UserError, match="run store trainers:29600: nothing answered"):
        worker._join(WorkerInfo(-1, "http://127.0.0.1:1", 1, 7, "here", str(tmp_path / "log")))
    assert capsys.readouterr().err == "megarl: waiting for the run's store trainers:29600, up to 1 s\n"


def test_a_call_that_does_not_return_is_given_up() -> None:
    with pytest.raises(TimeoutError, match="no answer within 0.1 s"):
        bounded(0.1, time.sleep, 30)
    assert bounded(5, max, 1, 2) == 2
    with pytest.raises(ZeroDivisionError):
        bounded(5, lambda: 1 / 0)
