"""The sending end of a weight sync: rank 0 leads the servers through its steps over HTTP, every sender fills messages.

    pause      only where requests are in flight (rollout.in_flight): they stop, or end, before anything changes
    receive    all workers receive, check and (staged) keep; a lone worker goes on by itself
    load       all workers load, drop the prefix cache and score the canary (or later: Scoring)
    commit     the version is set: only now do they serve again

and, where both share GPUs (launch.colocate), between syncs: sleep, while the trainer trains, and wake.

A server that fails closes its group, so that no sender waits for it;
whatever happens, a sync ends within sync.timeout_s a step.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from megarl.announce import announce
from megarl.rollout.client import Server
from megarl.rollout.patience import ACCOUNT_S, reading_s
from megarl.rollout.registry import RolloutError, ServerLost, ServerSilent, WorkerInfo
from megarl.rollout.wire import decode

Phase = Callable[[str], AbstractContextManager[None]]
POLL_S = 0.2


def untraced(name: str) -> AbstractContextManager[None]:
    """A Phase that nobody is told of."""
    return nullcontext()


class Canary(NamedTuple):
    """One server's score of the canary's T tokens."""

    logprobs: np.ndarray  # float32 [T-1]
    routes: np.ndarray | None  # [T-1, L, K]


class Scoring:
    """Servers that score the canary, each asked in a thread of its own, while the caller goes on. Nobody waits for one
    that hangs when the process ends.
    """

    def __init__(self, workers: Sequence[WorkerInfo], canary: list[int], timeout_s: float) -> None:
        def ask(worker: WorkerInfo, answer: Future[bytes]) -> None:
            server = Server(worker.url, timeout_s, worker.tokens.data)
            try:
                answer.set_result(server.post("/megarl/score", {"tokens": canary}))
            except Exception as error:
                answer.set_exception(error)
            finally:
                server.close()

        self._tokens = len(canary)
        self.failed: dict[str, str] = {}  # URLs of servers that did not answer well, and why
        self._asked = [(worker.url, Future[bytes]()) for worker in workers]
        for worker, (_, answer) in zip(workers, self._asked, strict=True):
            threading.Thread(target=ask, args=[worker, answer], name="canary", daemon=True).start()

    def scores(self, here: Callable[[], Collection[str]]) -> list[tuple[str, Canary]]:
        """By URL, once all have answered. here: the URLs of the servers that are not lost. Raises RolloutError where
        one refuses, is lost or does not answer in time; answered() has the others' scores then.
        """
        errors: list[RolloutError] = []
        scores = []
        for url, answer in self._asked:
            try:
                scores.append((url, self._score(url, answer, here)))
            except RolloutError as error:
                errors.append(error)
                self.failed[url] = str(error)
        if errors:
            raise errors[0]
        return scores

    def answered(self) -> list[tuple[str, Canary]]:
        """Of all that have done so by now, also those that are lost since."""
        scores = []
        for url, answer in self._asked:
            if answer.done():
                with suppress(Exception):  # of whatever kind: it is for scores() to tell
                    scores.append((url, self._score(url, answer, list)))
        return scores

    def _score(self, url: str, answer: Future[bytes], here: Callable[[], Collection[str]]) -> Canary:
        while not answer.done() and url in here():
            wait([answer], POLL_S)
        if not answer.done():
            raise ServerLost(f"rollout server {url}: lost before it had scored the canary")
        _, arrays = decode(answer.result())
        if len(arrays["logprobs"]) != self._tokens - 1:
            got = len(arrays["logprobs"])
            raise RolloutError(f"rollout server {url}: {got} log-probabilities of the canary's {self._tokens} tokens")
        return Canary(arrays["logprobs"], arrays.get("routes"))


@dataclass(frozen=True)
class InFlight:
    """A sync while requests run. how: rollout.in_flight. version: what tokens are labelled with once the weights are
    loaded. drain_s: how long the servers may take to pause.
    """

    how: str
    version: int
    drain_s: float


@dataclass(frozen=True)
class SyncSettings:
    """What the two ends agree on. senders: trainer ranks 0 .. senders-1
    of the group; the workers follow, server by server.
    """

    transport: str  # reshard | broadcast
    senders: int
    staged: bool
    timeout_s: float
    shared: bool = False  # trainer and workers share GPUs: megarl.weights.transport.shared


class SyncLeader:
    """Rank 0's hold on all servers. One that raised is spent: connect a new one."""

    def __init__(self, workers: list[WorkerInfo], store_host: str, store_port: int, settings: SyncSettings) -> None:
        self.workers, self.settings = workers, settings
        self._store = (store_host, store_port)
        self._servers = [Server(worker.url, settings.timeout_s, worker.tokens.control) for worker in workers]
        self._pool = ThreadPoolExecutor(len(workers) + 1, "weight-sync")
        self._lone = sum(worker.tp for worker in workers) == 1
        self._limit_s = self._deadline = 0.0  # of the step that was posted last
        self.seconds: dict[str, float] = {}  # of the last sync: "receive", of a lone worker its sending; then "load"
        self._sent, self._scores = 0.0, False  # when push() ended, whether it sent a canary
        self._loading: list[Future[bytes]] = []  # answers that loaded() waits for
        self.failed: dict[str, str] = {}  # URLs of servers that failed in the last step, in that order, and why

    def init(
        self,
        name: str,
        manifest_inputs: dict[str, Any],
        join: Callable[[], Any],
        remember_disk: bool,
        agreeing: list[str] | None = None,
    ) -> Any:
        """Brings all ends together in a group called `name`; returns what join(), which enters it here, returns.

        manifest_inputs: what every worker computes its manifest from. remember_disk: the workers note the digests of
        the weights that vLLM loaded, for check(). agreeing: what commit() has said of a sync before.
        """
        rank, bodies = self.settings.senders, []
        world_size = rank + sum(worker.tp for worker in self.workers)
        for worker in self.workers:
            init = {
                "store_host": self._store[0],
                "store_port": self._store[1],
                "group": name,
                "world_size": world_size,
                "rank_offset": rank,
                **asdict(self.settings),
                "manifest_inputs": manifest_inputs,
                "agreeing": agreeing,
            }
            bodies.append({"init": init, "remember_disk": remember_disk})
            rank += worker.tp
        posts = self._post("init", bodies)
        group = self._pool.submit(join)
        self._await([*posts, group])
        return group.result()

    def push(
        self,
        send: Callable[[], None],
        canary: list[int],
        abort: Callable[[], None],
        in_flight: InFlight | None = None,
        phase: Phase = untraced,
    ) -> None:
        """Sends the weights to all servers, which go on to load them and to score the canary (empty: none): loaded()
        waits for that, and where there is one worker alone for what it receives of other ranks. With in_flight they are
        paused before, and serve again once loaded.

        send: sends this rank's messages; abort: makes a pending send() fail; phase: around what has a name. Raises
        RolloutError, one line that names the server and, where bytes differ, tensor, rank and slice.
        """
        if in_flight:
            paused = self._post("pause", [{"in_flight": in_flight.how}] * len(self._servers), in_flight.drain_s)
            self._await(paused)
        start = time.monotonic()
        body = {"load": self._lone, "canary": canary, "version": in_flight.version if in_flight else 0}
        with phase("sync_receive"):
            posts = self._send(body, send, abort)
            if not self._lone:  # nobody loads before all have received
                self._await(posts)
        self.seconds = {"receive": time.monotonic() - start}
        self._sent, self._scores = time.monotonic(), bool(canary)
        self._loading = posts if self._lone else self._post("load", [body] * len(self._servers))

    def loaded(self) -> list[Canary]:
        """After push(), once all have loaded; they do not serve yet. Their scores of the canary."""
        answers = self._await(self._loading)
        self.seconds["load"] = time.monotonic() - self._sent
        if not self._scores:
            return []
        return [Canary(arrays["logprobs"], arrays.get("routes")) for _, arrays in map(decode, answers)]

    def _send(self, body: dict[str, Any], send: Callable[[], None], abort: Callable[[], None]) -> list[Future[bytes]]:
        """Returns once this rank's messages are sent; the servers' answers come then."""
        posts = self._post("receive", [body] * len(self._servers))
        for post in posts:
            post.add_done_callback(lambda done: abort() if done.exception() else None)
        try:
            send()
        except Exception as error:
            if not isinstance(error, RuntimeError):  # no failed server's doing; whoever receives learns of it at once
                abort()
                raise
            failed = " ".join(str(error).split())
            # a server that failed has left the group: its own account comes first
            wait(posts, ACCOUNT_S, return_when=FIRST_EXCEPTION)
            abort()
            self._await(posts)
            raise RolloutError(
                f"weight sync: sending failed although every rollout server received: {failed}"
            ) from None
        return posts

    def check(self, folder: str | None) -> None:
        """Compares the workers' weights with an engine loaded from
        `folder` (None: the one vLLM started with). Raises RolloutError. A worker whose host does not see the folder, or
        that had been updated before anybody asked, is told of, and held by checksums and the canary.
        """
        read_s = reading_s(Path(folder)) if folder is not None else 0.0
        within_s = self.settings.timeout_s + read_s
        answers = self._await(self._post("check", [{"folder": folder}] * len(self._servers), within_s))
        for server, answer in zip(self._servers, answers, strict=True):
            if not json.loads(answer)["compared"]:
                why = f"does not see {folder}" if folder is not None else "has served other trainers of this run"
                announce(
                    f"rollout server {server.url} {why}: its weights are compared by checksums and the canary, not by "
                    "digests (sync.digests)"
                )

    def commit(self, version: int, ask_agreeing: bool = False) -> list[str]:
        """Sets the version of all servers, which serve again from here on. ask_agreeing: returns the parts of the model
        that every rank of theirs is seen to hold as received (bit_sums.py).
        """
        body = {"version": version, "agreeing": ask_agreeing}
        answers = [json.loads(answer) for answer in self._await(self._post("commit", [body] * len(self._servers)))]
        for server, answer in zip(self._servers, answers, strict=True):
            serving = answer["version"]
            if serving != version:
                self.failed[server.url] = (
                    f"weight sync: rollout server {server.url} holds version {serving} after the commit of {version}; "
                    "does another run use it?"
                )
                raise RolloutError(self.failed[server.url])
        ranks = [set(parts) for answer in answers for parts in answer.get("agreeing", ())]
        return sorted(set.intersection(*ranks)) if ranks else []

    def turn(self, step: Literal["sleep", "wake"]) -> None:
        """All servers give their GPU memory up, or take it back, before this returns."""
        self._await(self._post(step, [{}] * len(self._servers)))

    def close(self) -> None:
        for server in self._servers:
            server.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _post(self, step: str, bodies: list[dict[str, Any]], within_s: float | None = None) -> list[Future[bytes]]:
        """A body to each server. within_s: how long all may take over the step; None is sync.timeout_s."""
        self._limit_s = self.settings.timeout_s if within_s is None else within_s
        self._deadline = time.monotonic() + self._limit_s
        self._errors: list[BaseException] = []  # in the order in which they came: the first is the cause of the others
        self.failed = {}
        return [
            self._pool.submit(self._post_one, server, step, body, self._limit_s)
            for server, body in zip(self._servers, bodies, strict=True)
        ]

    def _post_one(self, server: Server, step: str, body: dict[str, Any], within_s: float) -> bytes:
        try:
            return server.post(f"/megarl/sync/{step}", body, within_s)
        except BaseException as error:
            self._errors.append(error)
            self.failed[server.url] = str(error)
            raise

    def _await(self, posts: Sequence[Future[Any]]) -> list[Any]:
        """All answers, or the first failure: a server that failed will never join the others."""
        done, pending = wait(posts, max(self._deadline - time.monotonic(), 0) + 0.5, return_when=FIRST_EXCEPTION)
        for error in [*self._errors, *(post.exception() for post in done)]:
            if error is not None:
                self.close()
                raise error
        if pending:
            self.close()
            # of an init the last post is the group's
            late = [server.url for server, post in zip(self._servers, posts, strict=False) if post in pending]
            what = f"weight sync: no answer within {self._limit_s:.0f} s from rollout server "
            self.failed |= {url: what + url for url in late}
            raise ServerSilent(what + (", ".join(late) or "(group)"))
        return [post.result() for post in posts]
