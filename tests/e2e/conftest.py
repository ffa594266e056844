"""megarl's own commands as a user starts them: real Megatron ranks, a
real vLLM server, and a watch over what they leave behind.

Every process of a command carries a mark of its own in its environment,
by which it is found wherever it hangs in the process tree.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.observe.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tools.digit_sum import write_task  # noqa: E402
from tools.tiny_model import make_tiny_model  # noqa: E402

LIMIT_S = 900  # of one command: it only ends what hangs, also where two cores do four other things
MARK = "MEGARL_E2E"
TP2_PP2_EP2: dict[str, Any] = {"parallel": {"tp": 2, "pp": 2, "ep": 2}, "launch": {"trainers": 4}}
DP2: dict[str, Any] = {"launch": {"trainers": 2}}


class Command:
    """One `megarl ...` in a process of its own, its output in files."""

    def __init__(self, folder: Path, *argv: str) -> None:
        self.mark = f"{MARK}={uuid.uuid4().hex}"
        self._out, self._err = folder / "out.txt", folder / "err.txt"
        folder.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, **dict([self.mark.split("=")])}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "megarl.cli", *argv], cwd=ROOT, env=env, stdout=out, stderr=err
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait(self, within_s: float = LIMIT_S) -> int:
        return self.popen.wait(within_s)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.popen.poll() is None, f"the command ended before {what}:\n{self.out}\n{self.err}"
            assert time.monotonic() < deadline, f"no {what} within {LIMIT_S} s"
            time.sleep(0.02)

    def processes(self) -> dict[int, str]:
        """pid -> command line of everything that is alive under this command's mark, the command itself included."""
        self.popen.poll()
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def kill_everything(self) -> None:
        """kill -9, the parents first, so that nobody is left to clean up or to report."""
        while pids := sorted(self.processes()):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.popen.wait()


class Bench:
    """Starts commands on configurations below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands: list[Command] = []

    def start(self, command: str, name: str, config: dict[str, Any], *options: str) -> Command:
        """`megarl command` with run.dir = folder/name, where `config` does not name another."""
        config = {**config, "run": {"dir": str(self.folder / name), **config.get("run", {})}}
        path = self.folder / f"{name}.{command}.yaml"
        path.write_text(yaml.safe_dump(config))
        self.commands.append(Command(self.folder / f"{name}.{command}", command, str(path), *options))
        return self.commands[-1]

    def finish(self, command: str, name: str, config: dict[str, Any], *options: str) -> Command:
        """The same, to an end that must be a good one."""
        started = self.start(command, name, config, *options)
        assert started.wait() == 0, started.err
        assert started.processes() == {}
        return started

    def end(self) -> None:
        while self.commands:
            self.commands.pop().kill_everything()

    def rows(self, name: str) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            return read_metrics(self.folder / name)
        return []


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The task's files and a tiny model are there; data/ and model/ below bench.folder."""
    bench = Bench(tmp_path_factory.mktemp("e2e"))
    make_tiny_model(bench.folder / "model")
    write_task(bench.folder / "data", train=512, valid=16, demos=4096)
    yield bench
    bench.end()  # of a session fixture that failed


@pytest.fixture(autouse=True)
def nothing_left(bench: Bench) -> Iterator[None]:
    """Ends what a test that failed has left."""
    yield
    bench.end()


@pytest.fixture(scope="session")
def cold(bench: Bench) -> Path:
    """The tiny model after a few steps of `megarl sft` under TP2 x PP2
    x EP2: responses of several lengths, some of them right.
    """
    config = {
        **TP2_PP2_EP2,
        "model": {"path": str(bench.folder / "model")},
        "sft": {"data": str(bench.folder / "data" / "demos.jsonl"), "batch": 32},
        "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 9},
        "train": {"steps": 60, "lr": 3e-3},
    }
    bench.finish("sft", "sft", config)
    return bench.folder / "sft" / "hf"
