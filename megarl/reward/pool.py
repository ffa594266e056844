"""Rewards that cannot hurt the run: foreign code runs in processes of
its own, under a time limit, and a fault belongs to one sample.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

from megarl.config import DataConfig
from megarl.errors import UserError
from megarl.reward import FAST, get_reward

Sample = tuple[str, str, str]  # response, answer, prompt
START_TIMEOUT_S = 120.0  # of a worker: its imports


class Scorer:
    """Rewards of a batch as (value, fault): fault is "" or why there is
    no value, which then is NaN. Fast rewards stay in this process.
    """

    def __init__(self, data: DataConfig) -> None:
        self._reward = get_reward(data.reward) if data.reward in FAST else None
        self._pool = None if self._reward else RewardPool(data.reward, data.reward_workers, data.reward_timeout_s)

    def score(self, samples: Sequence[Sample]) -> list[tuple[float, str]]:
        if self._pool is not None:
            return self._pool.score(samples)
        assert self._reward is not None
        return [(self._reward(*sample), "") for sample in samples]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


class _Worker:
    def __init__(self, name: str) -> None:
        command = [sys.executable, "-m", "megarl.reward.worker", name, str(os.getpid())]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.sample: int | None = None
        self.deadline = time.monotonic() + START_TIMEOUT_S
        self.ready = False

    def ask(self, number: int, sample: Sample, timeout_s: float) -> None:
        assert self.process.stdin is not None
        self.sample, self.deadline = number, time.monotonic() + timeout_s
        with contextlib.suppress(BrokenPipeError):  # it has died: its end of file says so
            self.process.stdin.write(json.dumps(sample) + "\n")
            self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class RewardPool:
    """`workers` processes; one that dies or overruns is replaced. They end with this process, however it ends."""

    def __init__(self, name: str, workers: int, timeout_s: float) -> None:
        self.name, self.timeout_s = name, timeout_s
        self.workers = [_Worker(name) for _ in range(workers)]

    def score(self, samples: Sequence[Sample]) -> list[tuple[float, str]]:
        """Raises UserError if the reward cannot even be imported."""
        todo = deque(range(len(samples)))
        found: list[tuple[float, str]] = [(float("nan"), "")] * len(samples)
        while todo or any(worker.sample is not None for worker in self.workers):
            for worker in self.workers:
                if worker.ready and worker.sample is None and todo:
                    number = todo.popleft()
                    worker.ask(number, samples[number], self.timeout_s)
            for place, line in self._wait():
                worker = self.workers[place]
                if worker.sample is not None:
                    found[worker.sample] = self._outcome(line, worker)
                    worker.sample = None
                elif not line:
                    raise UserError(
                        f"data.reward {self.name!r}: its worker process could not start; the trainer's log says why"
                    )
                worker.ready = True
                if not line:
                    worker.end()
                    self.workers[place] = _Worker(self.name)
        return found

    def close(self) -> None:
        for worker in self.workers:
            worker.end()

    def _wait(self) -> list[tuple[int, str]]:
        """(place, line) of workers that have answered; the line is "" for one that has died or is out of time."""
        busy = {i: worker for i, worker in enumerate(self.workers) if worker.sample is not None or not worker.ready}
        with selectors.DefaultSelector() as selector:
            for i, worker in busy.items():
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, i)
            first = min(worker.deadline for worker in busy.values())
            ready = {key.data for key, _ in selector.select(max(0.0, first - time.monotonic()))}
        answers = []
        for i, worker in busy.items():
            if i in ready:
                assert worker.process.stdout is not None
                answers.append((i, worker.process.stdout.readline()))  # lines are shorter than a pipe's atomic write
            elif worker.deadline <= time.monotonic():
                answers.append((i, ""))
        return answers

    def _outcome(self, line: str, worker: _Worker) -> tuple[float, str]:
        if line:
            answer = json.loads(line)
            return answer.get("value", float("nan")), answer.get("fault", "")
        if time.monotonic() >= worker.deadline:
            return float("nan"), f"data.reward {self.name!r} took longer than data.reward_timeout_s {self.timeout_s:g}"
        return float("nan"), f"data.reward {self.name!r} ended its process (status {worker.process.wait()})"
