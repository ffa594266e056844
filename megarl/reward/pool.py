"""Rewards that cannot hurt the run: foreign code runs in processes of
its own, under a time limit, and a fault belongs to one sample.

Ours and not pebble's pool: pebble ends a worker, but not the processes that it started, hands the whole environment on,
and its workers import the trainer's main module.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import psutil

from megarl.config import DataConfig
from megarl.errors import UserError
from megarl.launch.lifeline import descendants
from megarl.reward import FAST, get_reward
from megarl.reward.inputs import RewardInput, Wanted

START_TIMEOUT_S = 120.0  # of a worker: its imports
EXIT_S = 1.0  # from the end of a worker's output to that of the worker
# What a worker sees of our environment, where data.reward_env does not name more: no keys, no tokens, no cluster.
VARIABLES = frozenset(
    "PATH HOME USER TZ TMPDIR LANG LANGUAGE PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX LD_LIBRARY_PATH "
    "SSL_CERT_FILE SSL_CERT_DIR OMP_NUM_THREADS HF_HOME".split()
)


class Score(NamedTuple):
    """A reward. fault: "" or why there is no value, which then is NaN."""

    value: float
    fault: str = ""


class Scorer:
    """Rewards of a batch. Fast rewards stay in this process."""

    def __init__(self, data: DataConfig) -> None:
        self._reward = get_reward(data.reward) if data.reward in FAST else None
        self._pool = None if self._reward else RewardPool.of(data)

    def score(self, samples: Sequence[RewardInput], *, stop_at_first: bool = False) -> list[Score]:
        """In the order of the samples. stop_at_first: after a fault the rest is left unscored, NaN without a fault."""
        if self._pool is not None:
            return self._pool.score(samples, stop_at_first=stop_at_first)
        assert self._reward is not None
        return [Score(self._reward(sample)) for sample in samples]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def try_reward(data: DataConfig, sample: RewardInput) -> float:
    """The reward of one sample, as a run would compute it. Raises UserError, one line, for any fault."""
    if data.reward in FAST:
        return get_reward(data.reward)(sample)
    pool = RewardPool.of(data, workers=1)
    try:
        [score] = pool.score([sample])
    finally:
        pool.close()
    if score.fault:
        raise UserError(score.fault)
    return score.value


class _Worker:
    """One process, in a group of its own. Neither side of its pipes is ever waited for without a time limit."""

    def __init__(self, name: str, variables: Sequence[str]) -> None:
        command = [sys.executable, "-m", "megarl.reward.worker", name, str(os.getpid())]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=_environment(variables),
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        for stream in (self.stdin, self.stdout):
            os.set_blocking(stream.fileno(), False)
        self.sample: int | None = None
        self.wanted: Wanted | None = None  # None until it is ready
        self.deadline = time.monotonic() + START_TIMEOUT_S
        self.unsent, self._unread = b"", b""

    def ask(self, number: int, arguments: dict[str, object], timeout_s: float) -> None:
        self.sample, self.deadline = number, time.monotonic() + timeout_s
        self.unsent = json.dumps(arguments, default=str).encode() + b"\n"
        self.send()

    def send(self) -> None:
        try:
            self.unsent = self.unsent[os.write(self.stdin.fileno(), self.unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # it has closed its input; the end of its output, or the time limit, says the rest
            self.unsent = b""

    def receive(self) -> str | None:
        """The next whole line, "" at the end of its output, None where there is no whole one yet."""
        if b"\n" not in self._unread:
            try:
                part = os.read(self.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                return None
            if not part:
                return ""
            self._unread += part
        line, newline, rest = self._unread.partition(b"\n")
        if not newline:
            return None
        self._unread = rest
        return line.decode()

    def has_exited(self, within_s: float) -> bool:
        """Without reaping it, so that its process group stays its own."""
        deadline = time.monotonic() + within_s
        while True:
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)

    def end(self) -> int:
        """Ends it and all that it started; its exit status."""
        if self.process.returncode is None:
            below: list[int] = []  # in sessions of their own, too; not to be found once it is gone
            with contextlib.suppress(psutil.Error, OSError):
                os.kill(self.process.pid, signal.SIGSTOP)  # it starts nothing more
                below = descendants(self.process.pid)
            for pid in below:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        for stream in (self.stdin, self.stdout):
            stream.close()
        return status


class RewardPool:
    """`workers` processes; one that dies or overruns is replaced. They end with this process, however it ends."""

    def __init__(self, name: str, workers: int, timeout_s: float, variables: Sequence[str] = ()) -> None:
        self.name, self.timeout_s, self.variables = name, timeout_s, variables
        self.workers = [_Worker(name, variables) for _ in range(workers)]

    @classmethod
    def of(cls, data: DataConfig, workers: int | None = None) -> RewardPool:
        return cls(data.reward, workers or data.reward_workers, data.reward_timeout_s, data.reward_env)

    def score(self, samples: Sequence[RewardInput], *, stop_at_first: bool = False) -> list[Score]:
        """Raises UserError if the reward cannot even be imported."""
        todo = deque(range(len(samples)))
        scores = [Score(float("nan"))] * len(samples)
        renewed: set[int] = set()
        while todo or any(worker.sample is not None for worker in self.workers):
            done = self._hand_out(todo, samples, renewed) + self._wait()
            for number, score in done:
                scores[number] = score
            if stop_at_first and any(score.fault for _, score in done):
                self._replace([i for i, worker in enumerate(self.workers) if worker.sample is not None])
                break
        return scores

    def close(self) -> None:
        for worker in self.workers:
            worker.end()

    def _hand_out(self, todo: deque[int], samples: Sequence[RewardInput], renewed: set[int]) -> list[tuple[int, Score]]:
        """Gives every idle worker a sample; those for which the reward lacks an argument are done at once. A worker
        that died while idle is replaced, once a batch (`renewed`): no sample did that.
        """
        done = []
        for i, worker in enumerate(self.workers):
            idle = worker.wanted is not None and worker.sample is None
            if todo and idle and i not in renewed and worker.has_exited(within_s=0):
                renewed.add(i)
                self._replace([i])
                continue
            while todo and worker.wanted is not None and worker.sample is None:
                number = todo.popleft()
                try:
                    worker.ask(number, worker.wanted.of(samples[number], self.name), self.timeout_s)
                except UserError as error:
                    done.append((number, Score(float("nan"), str(error))))
        return done

    def _wait(self) -> list[tuple[int, Score]]:
        """Samples whose worker has answered, has died or is out of time; such workers are replaced."""
        busy = {i: worker for i, worker in enumerate(self.workers) if worker.sample is not None or not worker.wanted}
        if not busy:
            return []
        with selectors.DefaultSelector() as selector:
            for i, worker in busy.items():
                selector.register(worker.stdout, selectors.EVENT_READ, i)
                if worker.unsent:
                    selector.register(worker.stdin, selectors.EVENT_WRITE, i)
            first = min(worker.deadline for worker in busy.values())
            ready = [(key.data, key.fileobj) for key, _ in selector.select(max(0.0, first - time.monotonic()))]
        done = []
        for i, worker in busy.items():
            if (i, worker.stdin) in ready:
                worker.send()
            line = worker.receive() if (i, worker.stdout) in ready else None
            late = line is None and worker.deadline <= time.monotonic()
            if worker.wanted is None and (line is not None or late):
                worker.wanted = self._started(line)
            elif line:
                answer = json.loads(line)
                done.append((worker.sample, Score(answer.get("value", float("nan")), answer.get("fault", ""))))
                worker.sample = None
            elif line == "" or late:
                done.append((worker.sample, Score(float("nan"), self._lost(worker, late))))
                self._replace([i])
        return done  # type: ignore[return-value]

    def _started(self, line: str | None) -> Wanted:
        """What a worker's first line says of the reward's arguments."""
        said: dict[str, Any] = json.loads(line) if line else {"fault": ""}
        if "fault" in said:
            what = said["fault"] or f"data.reward {self.name!r}: its worker process could not start; the log says why"
            raise UserError(what)
        return Wanted(tuple(said["required"]), tuple(said["optional"]), said["everything"])

    def _lost(self, worker: _Worker, late: bool) -> str:
        if late:
            return f"data.reward {self.name!r} took longer than data.reward_timeout_s {self.timeout_s:g}"
        if not worker.has_exited(within_s=EXIT_S):
            return f"data.reward {self.name!r} closed the output of its process"
        return f"data.reward {self.name!r} ended its process (status {worker.end()})"

    def _replace(self, places: list[int]) -> None:
        for i in places:
            self.workers[i].end()
            self.workers[i] = _Worker(self.name, self.variables)


def _environment(variables: Sequence[str]) -> dict[str, str]:
    chosen = {*VARIABLES, *variables}
    allowed = {key: value for key, value in os.environ.items() if key in chosen or key.startswith("LC_")}
    return {**allowed, "CUDA_VISIBLE_DEVICES": ""}
