"""A run that faults are injected into: the command, what can be seen of it from outside, and what it has learnt."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from megarl.checkpoints import newest, state_of, step_of
from megarl.errors import UserError
from megarl.launch.ports import reserve_port
from megarl.observe.metrics import read_metrics
from megarl.observe.stall import PULSE
from tools.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from tools.fault_kinds import Cable

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "MEGARL_TOKEN": "of the faults", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
REWARD = "tools.fault_reward.patient"
LIMIT_S = 600.0  # for a run to go on after a fault
PROMPTS, GROUP = 4, 4
BEGINS = {  # phase -> the event of trace.json whose end is its beginning
    "rollout": "canary",
    "pi_old": "reward",
    "update": "old_logprob",
    "sync": "update",
    "sync receive": "update",
    "sync load": "sync_receive",
}
PROCESSES = {  # who -> what stands in the command line
    "torchrun": "megarl.launch.torchrun",
    "rollout worker": "-m megarl rollout",
    "API server": "vllm.entrypoints",
    "engine core": "VLLM::EngineCore",
}


class Run:
    """`megarl run` in `folder`, from its making on. settings: over those that all runs here have; cable: to another
    host. joined: a worker there, that is none of the command's.
    """

    joined: subprocess.Popen[bytes] | None = None
    popen: subprocess.Popen[bytes]

    def __init__(
        self, folder: Path, model: Path, prompts: Path, settings: dict[str, Any], cable: Cable | None = None
    ) -> None:
        self.folder, self.dir, self.config = folder, folder / "run", folder / "run.yaml"
        self.cable, self._log, self._prompts = cable, folder / "out.txt", prompts
        here = cable.here if cable else "127.0.0.1"
        base: dict[str, Any] = {
            "model": {"path": str(model)},
            "data": {"prompts": str(prompts), "reward": REWARD, "reward_workers": 1, "shuffle": False},
            # two mini-batches: pi_old is then a phase of its own
            "batch": {"prompts": PROMPTS, "group": GROUP, "minibatches": 2, "equal_groups": "keep"},
            "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 9, "request_timeout_s": 60},
            "train": {"steps": 100_000, "lr": 1e-4, "stop_on_dull_steps": 0},
            "run": {"dir": str(self.dir), "rollout_samples": PROMPTS * GROUP},
            "launch": {"trainers": 2, "max_restarts": 1000, "stall_s": 30, "store": f"{here}:{reserve_port(here)}"},
        }
        for section, values in settings.items():
            base.setdefault(section, {}).update(values)
        folder.mkdir(parents=True, exist_ok=True)
        self.workers = base["rollout"]["engines"]  # that serve where nothing fails
        self.batches_ahead = base["rollout"].get("max_lag", 0) // 2
        self._replicas = base["launch"]["trainers"] // base.get("parallel", {}).get("tp", 1)
        self.config.write_text(yaml.safe_dump(base), encoding="utf-8")
        self.start()

    def start(self) -> None:
        self.popen = self._begin("-m", "megarl", "run", str(self.config))

    def _begin(self, *argv: str, elsewhere: bool = False, log: str = "out.txt") -> subprocess.Popen[bytes]:
        """A command of Python, its output in the run's folder. elsewhere: at the other end of the cable."""
        command = [sys.executable, *argv]
        if elsewhere and self.cable:
            command = self.cable.enter(*command)
        with (self.folder / log).open("ab") as out:
            return subprocess.Popen(command, env=ENV, stdout=out, stderr=out, start_new_session=True)

    @property
    def commands(self) -> list[subprocess.Popen[bytes]]:
        """All that belong to the run, the trainers' first."""
        return [self.popen, *([self.joined] if self.joined else [])]

    def join(self) -> None:
        """Another worker, of other weights, which the first sync replaces."""
        other = self.folder / "other"
        make_tiny_model(other, seed=1)
        words = ("-m", "megarl", "rollout", str(self.config), f"model.path={other}")
        self.joined = self._begin(*words, elsewhere=True, log="joined.txt")

    def wait(self, condition: Callable[[], Any], what: str, *, again: bool = False, every_s: float = 0.1) -> None:
        """again: the same command is given again when it ends, as a user would. UserError where it takes too long, or
        where the command ends before.
        """
        until = time.monotonic() + LIMIT_S
        while not condition():
            if self.popen.poll() is not None and not condition():
                if not again:
                    raise UserError(f"the run ended before {what}: {self.tail()}")
                self.start()
            if time.monotonic() > until:
                raise UserError(f"no {what} within {LIMIT_S:g} s: {self.tail()}")
            time.sleep(every_s)

    @property
    def text(self) -> str:
        return self._log.read_text("utf-8", errors="replace")

    def tail(self) -> str:
        return "\n".join(self.text.splitlines()[-12:])

    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.dir)

    def last(self) -> dict[str, Any]:
        """The row that was written last."""
        with contextlib.suppress(OSError, ValueError, IndexError), (self.dir / "metrics.jsonl").open("rb") as file:
            file.seek(-min(file.seek(0, os.SEEK_END), 2**16), os.SEEK_END)
            row: dict[str, Any] = json.loads(file.read().splitlines()[-1])
            return row
        return {"step": 0, "fleet/workers": 0}

    def step(self) -> int:
        return int(self.last()["step"])

    def asked_again(self) -> int:
        """Prompts that lost workers had, so far."""
        return int(sum(row["fleet/asked_again"] for row in self.rows()))

    def lost(self) -> int:
        """Workers that rank 0 has missed, so far."""
        return int(sum(row["fleet/lost"] for row in self.rows()))

    def saved(self) -> int:
        last = newest(self.dir / "checkpoints")
        return step_of(last) if last else 0

    def pids(self, who: str) -> list[int]:
        """`who`: supervisor, rank N, or one of PROCESSES, those that were started first before the others."""
        if who == "supervisor":
            return [self.popen.pid]
        if who.startswith("rank "):
            return [int(json.loads((self.dir / "logs" / PULSE / f"{who[5:]}.json").read_text("utf-8"))["pid"])]
        found = []
        for child in psutil.Process(self.popen.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if PROCESSES[who] in " ".join(child.cmdline()):
                    found.append((child.create_time(), child.pid))
        if not found:
            raise UserError(f"no {who} is running: {self.tail()}")
        return [pid for _, pid in sorted(found)]

    def trainers(self) -> list[int]:
        """What is known of rank 0's process: none while trainers are started again."""
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            return [pid for pid in self.pids("rank 0") if psutil.pid_exists(pid)]
        return []

    def until(self, phase: str) -> None:
        """Returns when rank 0 begins `phase`."""
        if phase == "checkpoint":
            self.wait(lambda: any((self.dir / "checkpoints").glob(".step_*.partial")), phase, every_s=0.002)
            return
        with (self.dir / "trace.json").open("rb") as file:
            file.seek(0, os.SEEK_END)
            mark = f'"name": "{BEGINS[phase]}"'.encode()
            self.wait(lambda: mark in file.read(), phase, every_s=0.002)

    def end(self) -> tuple[int, int]:
        """Ctrl-C; then what was lost and what was done twice, of steps and of prompts."""
        self._interrupt()
        try:
            self.popen.wait(LIMIT_S)
        finally:
            self.kill()
        return self._account()

    def _interrupt(self) -> None:
        self.popen.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """All of it."""
        for command in self.commands:
            _kill(command)

    def _account(self) -> tuple[int, int]:
        """As account(), by the steps' rows, the samples that rank 0 has kept and the stream of the last checkpoint."""
        rows = self.rows()
        steps = [row["step"] for row in rows]
        for row in rows if not self.batches_ahead else []:  # then each token is of the weights that are trained
            k3, lag = row.get("mismatch/kl_k3", 0.0), row["version/rollout_lag_max"]  # a guarded step has no k3
            if not (k3 <= 1e-9 and lag == 0):
                raise UserError(f"step {row['step']} was sampled from other weights: k3 {k3:.1e}, lag {lag:g}")
        last = newest(self.dir / "checkpoints")
        if last is None or step_of(last) != steps[-1]:
            raise UserError(f"the run's last step, {steps[-1]}, is not saved: {self.tail()}")
        order = [json.loads(line)["prompt"] for line in self._prompts.read_text("utf-8").splitlines()]
        stream = state_of(last)["stream"]
        drawn = order[: stream["position"]]
        waiting = Counter(order[index] for index in stream["returned"])
        learnt: Counter[str] = Counter()
        for step in steps:
            path = self.dir / "rollouts" / f"step_{step:06}.json"
            learnt.update(sample["prompt"] for sample in json.loads(path.read_text("utf-8"))["samples"])
        fixed = self._replicas == 1 or not self.batches_ahead  # else its replica has what was assigned to it
        return account(steps, drawn, waiting, learnt, len(steps) * PROMPTS // self._replicas if fixed else 0)


def account(
    steps: list[int], drawn: list[str], waiting: Counter[str], learnt: Counter[str], least: int
) -> tuple[int, int]:
    """What was lost and what was done twice, of steps and of prompts: what was drawn is learnt from once, or will be
    drawn again. learnt: samples by prompt of rank 0's replica, which has whole groups. least: how many of them.
    """
    lost = max(steps) - len(set(steps)) + (len(drawn) - len(waiting) - len(steps) * PROMPTS)
    lost += max(least - len(learnt), 0) + len(learnt.keys() - set(drawn))
    lost += sum(count < GROUP for count in learnt.values())
    doubled = len(steps) - len(set(steps)) + sum(count > GROUP for count in learnt.values())
    return lost, doubled + sum(prompt in learnt for prompt in waiting)


def _kill(command: subprocess.Popen[bytes]) -> None:
    """With all that is below it."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(command.pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                one.kill()
    command.wait()


class OuterRun(Run):
    """Trainers as on two nodes, each a torchrun with --max-restarts; `megarl rollout`, for itself, on a third."""

    _node: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """The worker, where it does not run; and the trainers, again where one of the two has ended."""
        if self._node is not None:
            _kill(self._node)
        if self.joined is None or self.joined.poll() is not None:
            self.joined = self._begin("-m", "megarl", "rollout", str(self.config), elsewhere=True, log="joined.txt")
        port = reserve_port("127.0.0.1")
        torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1000"]
        torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}"]
        self.popen, self._node = (
            self._begin(*torchrun, f"--node-rank={node}", "-m", "megarl.train", str(self.config)) for node in range(2)
        )

    @property
    def commands(self) -> list[subprocess.Popen[bytes]]:
        return [*super().commands, *([self._node] if self._node else [])]

    def _interrupt(self) -> None:
        for command in self.commands:
            if command is not self.joined:
                command.send_signal(signal.SIGINT)
