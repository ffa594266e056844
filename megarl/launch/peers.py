"""Trainer ranks under an outer torchrun: the first to fail tells all others why, and a host that is cut off is noticed.

Rank 0 listens, every other rank holds a connection to it. The kernels keep it alive: they answer for a process that
computes, and not for a host whose network is gone, which c10d's collectives would wait for. A rank that knows why the
run ends has WORDS_S to say so by itself; then a thread ends it, whatever it waits for. Lines are signed (door.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from megarl.addresses import SILENT_S, own_address, set_interface, spans_hosts, watch
from megarl.door import signed, verified
from megarl.errors import UserError
from megarl.launch.starts import keep_up, start_number

JOIN_S = 300.0  # from the first rank's coming to the last one's
REACH_S = 20.0  # for a connection to rank 0, once it listens
WORDS_S = 5.0
CONNECTED_S, A_RANK_S = 45.0, 0.25  # for process groups, once all ranks make them
STORE_S = 60.0  # for torchrun's store, which has answered torchrun itself
MOST_BYTES = 2**16  # of one line
COMES = "comes"  # what the selector knows a rank's connection by before it is one


class Peers:
    """What this rank has of the others. line: why the run ends, told by whoever failed first; "" while it goes on."""

    def __init__(self, rank: int, world: int, on_word: Callable[[str], None], end: Callable[[], None]) -> None:
        """on_word(line) is called once, when another rank's word comes; end() must end this process."""
        self.rank, self.world, self.line = rank, world, ""
        self.on_word, self._end = on_word, end
        self._links: dict[int, _Link] = {}  # by rank; of another rank than 0: rank 0 alone
        self._lock, self._closed, self._listens = threading.Lock(), False, False
        self._deadline, self._late = 0.0, ""
        self._met: dict[str, set[int]] = {}
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)

    def join(self, whole: dist.Store, address: str, start: int = 0) -> None:
        """Connects all ranks of one start, by way of torchrun's store. UserError where one does not come, or is not
        reached, or its host has started its ranks more often.
        """
        store, look = dist.PrefixStore(f"{start}", whole), partial(keep_up, whole, start)
        try:
            if self.rank == 0:
                self._gather(store, address, look)
            else:
                self._reach(store, address, look)
        except dist.DistError:
            raise UserError("rank 0's torchrun has ended; its terminal says why") from None
        self._listens = True
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    def meet(self, what: str, within_s: float = JOIN_S) -> None:
        """Returns when every rank has come here. UserError where they do not."""
        if not self._links:
            return
        # rank 0 alone knows who is late, and says so before the others give up
        until = time.monotonic() + within_s + (WORDS_S if self.rank else 0.0)
        self._note(self.rank, what)
        while len(self._met[what]) < (self.world if self.rank == 0 else 2):
            if self.line:
                raise UserError("another rank ended the run")
            if time.monotonic() > until:
                raise UserError(f"not all trainer ranks came to {what} within {within_s:g} s{self._late_ones(what)}")
            time.sleep(0.02)

    @contextlib.contextmanager
    def connecting(self) -> Iterator[None]:
        """Bounds the making of process groups, which gloo tries for half an hour."""
        self.meet("the process groups")
        hosts = ", ".join(sorted({f"{link.host} {link.address}" for link in self._links.values()}))
        within_s = CONNECTED_S + A_RANK_S * self.world
        self._late = (
            f"the trainer ranks did not connect to each other within {within_s:g} s, on the networks of {hosts}: "
            "do all hosts reach each other there? launch.interface names another"
        )
        self._deadline = time.monotonic() + within_s
        try:
            yield
        finally:
            self._deadline = 0.0

    def tell(self, line: str) -> str:
        """Tells all ranks why the run ends, unless another has told before; returns the line that counts."""
        with self._lock:
            if not self.line:
                self.line = line
        self._send({"why": self.line})
        return self.line

    def hear(self, within_s: float) -> str:
        """Another rank's word, for which one may wait whose peers went away."""
        until = time.monotonic() + within_s
        while not self.line and self._listens and time.monotonic() < until:
            time.sleep(0.05)
        return self.line

    def close(self) -> None:
        """This rank ends in order."""
        self._closed = True
        self._send({"bye": self.rank})
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def _late_ones(self, what: str) -> str:
        """Known to rank 0 alone."""
        late = sorted(set(range(1, self.world)) - self._met[what]) if self.rank == 0 else []
        hosts = {rank: link.host for rank, link in self._links.items()}
        words = ", ".join(f"rank {rank} (host {hosts.get(rank)})" for rank in late)
        return f"; missing: {words}; look at their logs" if late else ""

    def _gather(self, store: dist.Store, address: str, look: Callable[[], None]) -> None:
        with socket.create_server((address, 0), backlog=self.world) as listening:
            host, port = listening.getsockname()[:2]
            store.set("address", signed("peers", json.dumps([host, port, socket.gethostname()])))
            listening.settimeout(1.0)
            self._selector.register(listening, selectors.EVENT_READ, COMES)
            until = time.monotonic() + JOIN_S
            while len(self._links) < self.world - 1:
                if time.monotonic() > until:
                    raise UserError(self._not_come(address))
                look()
                if store.check(["failed"]) and (why := verified("peers", store.get("failed"))):
                    raise UserError(why)
                for key, _ in self._selector.select(timeout=1.0):
                    if key.data == COMES:
                        with contextlib.suppress(TimeoutError):
                            self._welcome(*listening.accept())
                    elif key.data is not None and (why := self._read(key.data)):
                        raise UserError(why.removeprefix("megarl: error: "))
                if self.line:
                    raise UserError("another rank ended the run")
            self._selector.unregister(listening)

    def _not_come(self, address: str) -> str:
        missing = sorted(set(range(1, self.world)) - self._links.keys())
        nodes = sorted({rank // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) for rank in missing})
        return (
            f"trainer ranks {missing} did not come within {JOIN_S:.0f} s of rank 0 on host {socket.gethostname()} "
            f"({address}): start torchrun with --node-rank {', '.join(map(str, nodes))} too, with the same "
            f"--master-addr and --master-port; where it runs, its terminal says why"
        )

    def _welcome(self, connection: socket.socket, source: Any) -> None:
        link = _Link(connection, source[0])
        with contextlib.suppress(OSError, EOFError):
            messages = link.read()
            if messages and "rank" in messages[0]:
                rank, link.host, link.address = (messages[0][key] for key in ("rank", "host", "address"))
                self._links[rank] = link
                self._selector.register(connection, selectors.EVENT_READ, rank)
                self._take(rank, messages[1:])  # what came at once with the first
                return
        connection.close()  # a stranger

    def _reach(self, store: dist.Store, address: str, look: Callable[[], None]) -> None:
        until = time.monotonic() + JOIN_S
        reach_until = 0.0
        while True:
            if time.monotonic() > until:
                raise UserError(
                    f"rank 0 did not come within {JOIN_S:.0f} s of rank {self.rank} on host {socket.gethostname()} "
                    f"({address}): the terminal of torchrun with --node-rank 0 says why"
                )
            look()
            if not store.check(["address"]) or (where := verified("peers", store.get("address"))) is None:
                time.sleep(0.2)
                continue
            host, port, name = json.loads(where)
            try:
                connection = socket.create_connection((host, port), timeout=5.0, source_address=(address, 0))
                break
            except OSError as error:
                reach_until = reach_until or time.monotonic() + REACH_S
                if time.monotonic() > reach_until:
                    raise UserError(
                        f"rank {self.rank} on host {socket.gethostname()} ({address}) cannot reach rank 0 at {host} on "
                        f"host {name} ({error.strerror or error}): is that network up? launch.interface names another"
                    ) from None
                time.sleep(0.5)
        link = _Link(connection, host)
        link.host, link.address = name, host
        link.write({"rank": self.rank, "host": socket.gethostname(), "address": address})
        self._links[0] = link
        self._selector.register(connection, selectors.EVENT_READ, 0)

    def _listen(self) -> None:
        ended_at: tuple[float, str] | None = None
        while not self._closed:
            for key, _ in self._selector.select(timeout=0.5):
                if key.data is not None and (why := self._read(key.data)):
                    ended_at = ended_at or (time.monotonic(), why)
            now = time.monotonic()
            if self._deadline and now > self._deadline:
                self._deadline = 0.0
                self._heard(f"megarl: error: {self._late}")
            if ended_at and now - ended_at[0] > WORDS_S:
                self._heard(ended_at[1])
            if self.line:
                break
        until = time.monotonic() + WORDS_S
        while not self._closed and time.monotonic() < until:
            time.sleep(0.05)
        if not self._closed:
            self._end()

    def _read(self, rank: int) -> str:
        """Takes what `rank` sent. Returns why it will not send any more where it ended without a word."""
        link = self._links[rank]
        try:
            self._take(rank, link.read())
            return ""
        except EOFError:
            self._forget(rank)
            return f"megarl: error: {ended(rank, link.host)}"
        except OSError as error:
            self._forget(rank)
            self._heard(
                f"megarl: error: host {link.host} ({link.address}), of trainer rank {rank}, has not answered host "
                f"{socket.gethostname()} for {SILENT_S} s ({error.strerror}): it is off, or a network is down; start "
                "the run again when it is back, it goes on from its last checkpoint"
            )
            return ""

    def _take(self, rank: int, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            if "why" in message:
                self._heard(message["why"])
            elif "bye" in message:
                self._forget(rank)
            elif "at" in message:
                self._note(rank, message["at"])

    def _heard(self, line: str) -> None:
        with self._lock:
            if self.line:
                return
            self.line = line
        self.on_word(line)
        self._send({"why": line})

    def _note(self, rank: int, what: str) -> None:
        with self._lock:
            met = self._met.setdefault(what, set())
            met.add(rank)
            complete = len(met) == self.world
        if rank == self.rank != 0 or (self.rank == 0 and complete):
            self._send({"at": what})

    def _forget(self, rank: int) -> None:
        link = self._links.pop(rank, None)
        if link is not None:
            self._selector.unregister(link.connection)
            link.connection.close()

    def _send(self, message: dict[str, Any]) -> None:
        for link in list(self._links.values()):
            with contextlib.suppress(OSError):
                link.write(message)


class _Link:
    """A connection to one rank."""

    def __init__(self, connection: socket.socket, address: str) -> None:
        self.connection, self.address, self.host = connection, address, address
        self._rest = b""
        self._lock = threading.Lock()
        watch(connection)
        connection.settimeout(5.0)

    def write(self, message: dict[str, Any]) -> None:
        with self._lock:
            self.connection.sendall(signed("peers", json.dumps(message)).encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """What has come, of this run's ranks alone. EOFError at the other's end, OSError where its host is silent."""
        try:
            came = self.connection.recv(MOST_BYTES)
        except ConnectionResetError:
            came = b""
        if not came:
            raise EOFError
        *lines, self._rest = (self._rest + came).split(b"\n")
        if len(self._rest) > MOST_BYTES:
            raise EOFError
        return [json.loads(text) for line in lines if (text := verified("peers", line)) is not None]


def ended(rank: int, host: str) -> str:
    """Of a rank that was killed, say."""
    return f"trainer rank {rank} on host {host} ended without a word"


def joined(on_word: Callable[[str], None], end: Callable[[], None], interface: str | None, store_host: str) -> Peers:
    """The ranks of the torchrun above this process, connected, on the network that gloo will take; of any other start,
    nobody.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    peers = Peers(rank, world, on_word, end)
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    towards = master if spans_hosts() else store_host
    if world == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        os.environ |= set_interface(interface, towards)
        return peers
    port = int(os.environ["MASTER_PORT"])
    try:
        whole = dist.TCPStore(master, port, is_master=False, timeout=timedelta(seconds=STORE_S))
    except dist.DistError as error:
        raise UserError(
            f"rank {rank} on host {socket.gethostname()} does not reach torchrun's store at {master}:{port}, of "
            f"--node-rank 0 ({' '.join(str(error).split())[:160]}): is torchrun running there, and that network up?"
        ) from None
    store = dist.PrefixStore(f"megarl/peers/{os.environ.get('TORCHELASTIC_RUN_ID')}", whole)
    with _told(store, start_number()):
        os.environ |= set_interface(interface, towards)
        peers.join(store, own_address(master, interface) if spans_hosts() else "127.0.0.1", start_number())
    global _current
    _current = peers
    return peers


@contextlib.contextmanager
def _told(whole: dist.Store, start: int) -> Iterator[None]:
    """A UserError inside is told to rank 0, which waits for this one."""
    try:
        yield
    except UserError as error:
        with contextlib.suppress(dist.DistError):
            store = dist.PrefixStore(f"{start}", whole)
            store.set("failed", signed("peers", str(error)))
            store.check(["failed"])  # set() does not wait for the store
        raise


_current: Peers | None = None


def connecting() -> contextlib.AbstractContextManager[None]:
    """Around the making of process groups: bounded where ranks came by joined()."""
    return _current.connecting() if _current is not None else contextlib.nullcontext()


def tell(line: str) -> None:
    """All ranks end, for this reason, where they came by joined(); on this rank's terminal, too."""
    if _current is not None:
        _current.on_word(_current.tell(line))
