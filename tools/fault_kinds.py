"""The faults of tools/faults.py, and how each is done to a run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megarl.checkpoints import newest
from tools.fault_run import Run

SLOW_S = 6.0
LONG_S = 60.0  # a link is cut: for longer than any time-out of the runs here


@dataclass(frozen=True)
class Fault:
    """do: injects it and returns when that was, time.monotonic(). mend: what a user does once the run goes on.

    restarts: the trainers. more: workers that the run has for good from then on. loses: workers, for a while.
    """

    name: str
    do: Callable[[Run], float]
    mend: Callable[[Run], object] = lambda run: None
    restarts: bool = False
    more: int = 0
    loses: int = 0


def struck(what: str, who: str, phase: str, restarts: bool = False, every: bool = False) -> Fault:
    """A signal to the oldest process of a kind, or to every one."""

    def do(run: Run) -> float:
        pids = run.pids(who)  # looked for before: some phases are short
        run.until(phase)
        for pid in pids if every else pids[:1]:
            os.kill(pid, signal.Signals[what])
        return time.monotonic()

    name = f"{what} of {'every ' if every else ''}{who} in {phase}"
    serves = who in ("engine core", "API server", "rollout worker")
    return Fault(name, do, restarts=restarts, loses=serves * (2 if every else 1))


def slow(who: str, phase: str) -> Fault:
    """It stands still for SLOW_S and goes on by itself."""

    def do(run: Run) -> float:
        pid = run.pids(who)[0]
        run.until(phase)
        start = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(SLOW_S)
        os.kill(pid, signal.SIGCONT)
        return start

    return Fault(f"SIGSTOP of {who} in {phase} for {SLOW_S:g} s", do)


def _stop_torchrun(run: Run) -> float:
    """No rank waits for it, so that the run goes on until its end; what is waited for is that it is ended."""
    (pid,) = run.pids("torchrun")
    run.until("update")
    start = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    run.wait(lambda: not Path(f"/proc/{pid}").exists(), "end of torchrun")
    return start


def _damage(how: str, run: Run) -> float:
    """Harms the newest of several checkpoints, and kills the trainers."""
    (torchrun,) = run.pids("torchrun")
    run.wait(lambda: len([*(run.dir / "checkpoints").glob("step_*/megarl.json")]) > 1, "second checkpoint")
    start = time.monotonic()
    os.kill(torchrun, signal.SIGKILL)
    last = newest(run.dir / "checkpoints")
    assert last is not None
    part = min(last.glob("*.distcp"))
    data = part.read_bytes()
    middle = len(data) // 2
    if how == "missing part":
        part.unlink()
    elif how == "emptied megarl.json":
        (last / "megarl.json").write_bytes(b"")
    elif how == "truncated part":
        part.write_bytes(data[:middle])
    else:
        part.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    return start


def _fill(run: Run) -> float:
    """The run's small file system, until the run has ended by it; then the user makes room."""
    start, filler = time.monotonic(), run.dir / "filler"
    try:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        run.wait(lambda: run.popen.poll() is not None, "end by the full disk")
    finally:
        filler.unlink()
    return start


def _join(run: Run) -> float:
    run.join()
    return time.monotonic()


def _leave(run: Run) -> float:
    run.until("rollout")
    assert run.joined is not None
    run.joined.send_signal(signal.SIGTERM)
    return time.monotonic()


def _interrupt(run: Run) -> float:
    """Of a worker that joins for it: one that a user has ended is not started again."""
    run.join()
    run.wait(lambda: run.last()["fleet/workers"] > run.workers, "worker that joins")
    run.until("rollout")
    assert run.joined is not None
    run.joined.send_signal(signal.SIGINT)
    return time.monotonic()


def _cut(run: Run) -> float:
    assert run.cable is not None
    before = run.last()["fleet/workers"]
    run.until("rollout")
    run.cable.switch("down")
    start = time.monotonic()
    run.wait(lambda: run.last()["fleet/workers"] < before, "step without the worker that is cut off")
    return start


def _mend_cable(run: Run) -> None:
    assert run.cable is not None
    run.cable.switch("up")


def _cut_long(phase: str) -> Fault:
    """The link of the only worker, which comes back."""

    def do(run: Run) -> float:
        assert run.cable is not None
        run.until(phase)
        run.cable.switch("down")
        start = time.monotonic()
        time.sleep(LONG_S)
        run.cable.switch("up")
        return start

    return Fault(f"cut link of the only worker in {phase} for {LONG_S:g} s", do)


def worker_faults(cable: bool) -> list[Fault]:
    """Two servers, and for a while a third that joins, is cut off and leaves."""
    phases = ("rollout", "sync receive", "sync load")
    found = [slow(who, phase) for who in ("engine core", "API server") for phase in phases]
    found += [slow("rollout worker", "rollout")]
    where = "from another host" if cable else "from a command of its own"
    found += [Fault(f"a worker with other weights joins {where}", _join, more=1)]
    found += [Fault("cut link of a worker in rollout", _cut, _mend_cable)] if cable else []
    found += [Fault("SIGTERM of a worker in rollout", _leave, more=-1)]
    found += [struck("SIGKILL", "engine core", phase) for phase in phases]
    found += [struck("SIGKILL", "API server", phase) for phase in phases[:2]]
    found += [struck("SIGKILL", "rollout worker", "rollout")]
    found += [struck("SIGTERM", "engine core", "rollout"), Fault("SIGINT of a worker in rollout", _interrupt, loses=1)]
    found += [struck("SIGSTOP", "engine core", "sync receive"), struck("SIGSTOP", "API server", "rollout")]
    found += [struck("SIGKILL", "engine core", "rollout", every=True)]
    return found


def ahead_faults() -> list[Fault]:
    """Two servers whose requests go on through every sync, and two trainer ranks."""
    phases = ("rollout", "pi_old", "update", "sync receive", "sync load", "checkpoint")
    found = [slow("engine core", "sync load"), slow("API server", "sync load")]
    found += [struck("SIGKILL", "engine core", phase) for phase in phases]
    found += [struck("SIGKILL", "API server", phase) for phase in ("sync receive", "sync load")]
    found += [struck("SIGKILL", "rollout worker", "sync receive")]
    found += [struck("SIGSTOP", "engine core", "sync receive"), struck("SIGSTOP", "engine core", "sync load")]
    found += [struck("SIGKILL", "rank 1", phase, True) for phase in ("rollout", "pi_old", "checkpoint")]
    return [replace(fault, name=f"{fault.name}, requests in flight") for fault in found]


def trainer_faults(small_disk: bool) -> list[Fault]:
    """One server, and two trainer ranks."""
    phases = ("rollout", "pi_old", "update", "sync", "checkpoint")
    found = [slow(f"rank {rank}", phase) for rank in (1, 0) for phase in ("update", "sync", "checkpoint")]
    found += [slow("supervisor", "update"), slow("torchrun", "update")]
    found += [struck("SIGKILL", "rank 0", phase, True) for phase in phases]
    found += [struck("SIGKILL", "rank 1", "update", True), struck("SIGKILL", "torchrun", "update", True)]
    found += [struck("SIGSTOP", "rank 0", "update", True), struck("SIGSTOP", "rank 1", "sync", True)]
    found += [Fault("SIGSTOP of torchrun in update", _stop_torchrun, restarts=True)]
    harms = ("truncated part", "changed bit", "missing part", "emptied megarl.json")
    found += [Fault(f"{how} of the newest checkpoint", partial(_damage, how), restarts=True) for how in harms]
    found += [Fault("SIGKILL of the only API server in rollout", struck("SIGKILL", "API server", "rollout").do)]
    ends = {"SIGKILL": ("rollout",), "SIGTERM": ("update",)}
    found += [struck(what, "supervisor", phase, True) for what, phases in ends.items() for phase in phases]
    return [*found, *([Fault("full disk at a checkpoint", _fill, restarts=True)] if small_disk else [])]


def outer_faults() -> list[Fault]:
    """Trainers under an outer torchrun, the only worker on another host."""
    found = [struck("SIGKILL", rank, phase, True) for rank, phase in (("rank 1", "update"), ("rank 0", "rollout"))]
    outer = [replace(fault, name=f"{fault.name} under torchrun --max-restarts") for fault in found]
    return [*outer, *(_cut_long(phase) for phase in ("rollout", "sync"))]


class Cable:
    """A network of its own for a worker, and a cable to it from ours. Root makes it; it goes with this process."""

    def __init__(self) -> None:
        number = os.getpid()  # several commands on one machine have networks of their own
        name, net = f"faults{number}", f"10.78.{number % 256}"
        self.here, there = f"{net}.1", f"{net}.2"
        hold = ["unshare", "--net", "--kill-child", "sleep", "infinity"]
        self._holder = subprocess.Popen(hold)
        until = time.monotonic() + 10
        ours = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self._holder.pid}/ns/net") == ours and time.monotonic() < until:
            time.sleep(0.01)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(self._holder.pid))
        _ip("address", "add", f"{self.here}/30", "dev", name)
        _ip("link", "set", name, "up")
        for words in (["address", "add", f"{there}/30", "dev", "eth0"], ["link", "set", "lo", "up"]):
            subprocess.run(self.enter("ip", *words), check=True)
        self.switch("up")

    def enter(self, *argv: str) -> list[str]:
        return ["nsenter", "--target", str(self._holder.pid), "--net", *argv]

    def switch(self, to: str) -> None:
        """up or down, at the far end: nobody is told."""
        subprocess.run(self.enter("ip", "link", "set", "eth0", to), check=True)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def may_make_networks() -> bool:
    tools = all(shutil.which(tool) for tool in ("ip", "unshare", "nsenter"))
    return tools and not subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode
