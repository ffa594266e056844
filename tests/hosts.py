"""Hosts for tests on this machine: each has its own network, processes, mounts and name, and a cable into one switch.

A host is a process, the first of its own process namespace: with it all that runs there ends, and with the last process
the namespaces go. Nothing of it has a name on this machine, so nothing is left whatever happens to the test. As Debian
and Ubuntu install it, a host's own name means 127.0.1.1 to itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megarl.launch.lifeline import die_with_parent

ROOT = Path(__file__).resolve().parents[1]
TMPDIR = "/mnt"  # of a host: short, as unix sockets need it
NET = "10.77.0"
_HOLD = (
    "import ctypes, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
    "signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True); signal.pause()"
)


class Host:
    """One host: `folder` holds its /etc/hosts, its temporary directory and its logs."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, address, folder
        self.tmp = folder / "tmp"
        self.tmp.mkdir(parents=True)
        hold = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", sys.executable, "-c", _HOLD]
        parent = os.getpid()
        self._holder = subprocess.Popen(
            hold, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=lambda: die_with_parent(parent)
        )
        assert self._holder.stdout is not None and self._holder.stdout.readline() == b"up\n"
        (first,) = psutil.Process(self._holder.pid).children()
        self.pid = first.pid
        self.run("hostname", name)
        self.run("ip", "link", "set", "lo", "up")
        self.run("mount", "--bind", str(self.tmp), TMPDIR)

    def enter(self, *argv: str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--pid", f"--wd={ROOT}", *argv]

    def run(self, *argv: str) -> str:
        return subprocess.run(self.enter(*argv), check=True, capture_output=True, text=True).stdout

    def start(self, name: str, *argv: str, **env: str) -> Started:
        return Started(self, name, argv, env)

    def keep_apart(self, folder: Path) -> Path:
        """What this host finds at `folder`, which others share, is a folder of its own from here on."""
        own = self.folder / f"own_{folder.name}"
        for path in (folder, own):
            path.mkdir(parents=True, exist_ok=True)
        self.run("mount", "--bind", str(own), str(folder))
        return own

    def off(self) -> None:
        """Without its first process a host has none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._holder.wait()
        if self._holder.stdout:
            self._holder.stdout.close()


class Started:
    """A command on a host. What it prints, on either stream, is `text`."""

    def __init__(self, host: Host, name: str, argv: tuple[str, ...], env: dict[str, str]) -> None:
        self._out = host.folder / f"{name}.txt"
        paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        with self._out.open("wb") as out:
            self.popen = subprocess.Popen(
                host.enter(*argv),
                env={**os.environ, **paths, "TMPDIR": TMPDIR, **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self) -> str:
        return self._out.read_text(errors="replace")

    def signal(self, number: int) -> None:
        """To the command, which nsenter starts and waits for."""
        for child in psutil.Process(self.popen.pid).children():
            child.send_signal(number)

    def wait(self, within_s: float) -> int:
        try:
            return self.popen.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended within {within_s:g} s:\n{self.text}") from None

    def until(self, condition: Callable[[], bool], within_s: float) -> None:
        """While it runs."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert self.popen.poll() is None, f"ended early:\n{self.text}"
            assert time.monotonic() < deadline, f"nothing within {within_s:g} s:\n{self.text}"
            time.sleep(0.05)


class Network:
    """A switch with hosts; cut() pulls a host's cable at the switch, so that no one is told."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._switch = Host("switch", "", folder / "switch")
        self.hosts: list[Host] = []
        try:
            self._switch.run("ip", "link", "add", "br0", "type", "bridge")
            self._switch.run("ip", "link", "set", "br0", "up")
            for number, name in enumerate(names, 1):
                self._plug(Host(name, f"{NET}.{number}", folder / name), number)
            for host in self.hosts:
                self._names(host)
        except BaseException:
            self.end()
            raise

    def _plug(self, host: Host, number: int) -> None:
        self.hosts.append(host)
        ends = ["ip", "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", str(host.pid)]
        net_only = ["nsenter", "--target", str(self._switch.pid), "--net"]
        subprocess.run([*net_only, *ends], check=True)  # this machine's process ids
        self._switch.run("ip", "link", "set", f"port{number}", "master", "br0", "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")

    def _names(self, host: Host) -> None:
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {host.name}"]
        lines += [f"{other.address} {other.name}" for other in self.hosts if other is not host]
        (host.folder / "hosts").write_text("\n".join([*lines, ""]))
        host.run("mount", "--bind", str(host.folder / "hosts"), "/etc/hosts")

    def cut(self, host: Host) -> None:
        self._switch.run("ip", "link", "set", f"port{self.hosts.index(host) + 1}", "nomaster")

    def join(self, host: Host) -> None:
        self._switch.run("ip", "link", "set", f"port{self.hosts.index(host) + 1}", "master", "br0")

    def end(self) -> None:
        for host in [*self.hosts, self._switch]:
            host.off()


@contextlib.contextmanager
def network(folder: Path, *names: str) -> Iterator[Network]:
    """Hosts of these names; skips the test where this machine does not let us make them."""
    tools = [tool for tool in ("ip", "unshare", "nsenter") if not shutil.which(tool)]
    if (
        tools
        or subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "true"], capture_output=True).returncode
    ):
        pytest.skip(f"no network namespaces: {', '.join(tools) + ' missing' if tools else 'not allowed here (root?)'}")
    made = Network(folder, list(names))
    try:
        yield made
    finally:
        made.end()
