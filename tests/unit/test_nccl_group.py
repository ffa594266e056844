"""The weight group over NCCL, without a GPU: our calls into torch's backend over a stand-in with its signatures, the
time limit, a close beside a sending thread, and the meeting over a real store.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarl.weights.transport import nccl
from megarl.weights.transport.groups import WeightGroup

CUDA = torch.device("cuda", 0)


class Work:
    """completes: whether it is done; an error is raised by a wait with a limit, as by torch's."""

    def __init__(self, completes: bool, error: Exception | None = None) -> None:
        self.completes, self.error, self.waited = completes, error, False

    def is_completed(self) -> bool:
        return self.completes

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.waited = True
        if self.error is not None and timeout:
            raise self.error
        return True


class Backend:
    """torch's Backend as far as we call it: the names and numbers of arguments are compared with torch below."""

    def __init__(self, work: Work) -> None:
        self.work, self.calls, self.inside = work, list[Any](), threading.Event()
        self.hold = 0.0
        self.connects = threading.Event()
        self.connects.set()

    def eager_connect_single_device(self, device: torch.device) -> None:
        self.connects.wait(30)
        self.calls.append("connect")

    def _start_coalescing(self) -> None:
        self.calls.append("start")

    def _end_coalescing(self) -> Work:
        self.calls.append("end")
        return self.work

    def send(self, tensors: list[torch.Tensor], dstRank: int, tag: int) -> None:
        self.inside.set()
        time.sleep(self.hold)
        if "abort" in self.calls:
            raise AssertionError("the communicator was freed beside a thread that hands operations to it")
        if dstRank == 99:
            raise TypeError("no such rank")
        self.calls.append(("send", dstRank))

    def recv(self, tensors: list[torch.Tensor], srcRank: int, tag: int) -> None:
        self.calls.append(("recv", srcRank))

    def broadcast(self, tensor: torch.Tensor, root: int) -> Work:
        self.calls.append(("broadcast", root))
        return self.work

    def abort(self) -> None:
        self.calls.append("abort")


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def group_over(backend: Backend, store: dist.Store, monkeypatch: pytest.MonkeyPatch, timeout_s: float = 5) -> Any:
    monkeypatch.setattr(nccl, "_make", lambda *arguments: backend)
    monkeypatch.setattr(nccl, "nccl_version", lambda: "2.28.3")
    return WeightGroup(store, "test", 0, 1, timeout_s, CUDA)


BUFFER = torch.zeros(4, dtype=torch.uint8)


def test_the_stand_in_has_the_signatures_of_torch() -> None:
    """A Backend's coalescing takes no device, which a ProcessGroup's does."""
    real = torch._C._distributed_c10d.Backend
    for name in ("_start_coalescing", "_end_coalescing", "send", "recv", "eager_connect_single_device", "abort"):
        ours = getattr(Backend, name).__code__
        [given] = re.findall(rf"^{name}\((.*?)\) ->", getattr(real, name).__doc__, re.M)
        assert len(re.findall(r"\w+: ", given)) == ours.co_argcount, f"{name}({given})"


def test_a_bucket_is_one_group_of_operations(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend(Work(True))
    group = group_over(backend, store, monkeypatch)
    assert backend.calls == ["connect"], "the communicator is made before the first message"
    for work in group.exchange([(BUFFER, 3)], [(BUFFER, 1), (BUFFER, 2)], 7):
        work.wait()
    assert backend.calls[1:] == ["start", ("send", 3), ("recv", 1), ("recv", 2), "end"] and backend.work.waited
    assert group.exchange([], [], 8) == []
    with pytest.raises(TypeError):
        group.exchange([(BUFFER, 99)], [], 9)
    assert backend.calls[-1] == "end", "a group of operations that failed is ended"


def test_a_wait_ends_at_the_time_limit(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend(Work(False))
    group = group_over(backend, store, monkeypatch, timeout_s=0.05)
    works = group.exchange([], [(BUFFER, 1)], 0)
    with pytest.raises(RuntimeError, match=r"NCCL was not done within 0\.05 s"):
        works[0].wait()
    assert backend.calls[-1] == "abort" and not backend.work.waited
    with pytest.raises(RuntimeError, match="was closed"):
        group.exchange([], [(BUFFER, 1)], 1)


def test_a_rank_that_died_before_the_communicator_was_made_holds_nobody(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks make it or none, and the call has no time limit of its own."""
    backend = Backend(Work(True))
    backend.connects.clear()
    with pytest.raises(RuntimeError, match=r"NCCL was not done within 0\.05 s"):
        group_over(backend, store, monkeypatch, timeout_s=0.05)
    assert backend.calls == ["abort"]
    backend.connects.set()


def test_a_communicator_that_cannot_be_made_is_an_error(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend(Work(True))
    monkeypatch.setattr(
        backend, "eager_connect_single_device", lambda device: (_ for _ in ()).throw(RuntimeError("no"))
    )
    with pytest.raises(RuntimeError, match="^no$"):
        group_over(backend, store, monkeypatch)


def test_a_rank_that_leaves_ends_the_others_wait(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL tells nobody; the limit of 30 s is not waited for."""
    backends = [Backend(Work(False)), Backend(Work(False))]
    monkeypatch.setattr(nccl, "_make", lambda store, rank, *_: backends[rank])
    monkeypatch.setattr(nccl, "nccl_version", lambda: "2.28.3")

    def come(rank: int) -> WeightGroup:
        mine = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        return WeightGroup(mine, "test", rank, 2, 30, CUDA)

    with ThreadPoolExecutor(2) as pool:
        leaves, waits = pool.map(come, range(2))
        waited = pool.submit(waits.broadcast(BUFFER).wait)
        leaves.close()
        with pytest.raises(RuntimeError, match="rank 0 of the weight group left it"):
            waited.result()
    assert backends[1].calls[-1] == "abort"


def test_what_was_aborted_or_failed_is_not_taken_for_done(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An aborted operation is completed to torch."""
    backend = Backend(Work(True))
    group = group_over(backend, store, monkeypatch)
    works = group.exchange([], [(BUFFER, 1)], 0)
    group.close()
    with pytest.raises(RuntimeError, match="was closed"):
        works[0].wait()
    failing = Backend(Work(True, RuntimeError("remote process exited")))
    with pytest.raises(RuntimeError, match="remote process exited"):
        group_over(failing, store, monkeypatch).broadcast(BUFFER).wait()


def test_a_close_waits_for_the_thread_that_hands_operations_over(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Backend(Work(True))
    backend.hold = 0.1
    group = group_over(backend, store, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(group.exchange, [(BUFFER, 1)], [], 0)
        assert backend.inside.wait(5)
        group.close()
        sent.result(5)
    assert backend.calls[-2:] == ["end", "abort"]


@pytest.mark.parametrize(("versions", "refused"), [(["2.28.3"] * 3, False), (["2.28.3", "2.27.5", "2.27.5"], True)])
def test_other_releases_of_nccl_are_refused_on_every_rank(
    store: dist.TCPStore, versions: list[str], refused: bool
) -> None:
    def come(rank: int) -> str:
        mine = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        try:
            nccl.meet(mine, rank, len(versions), 5.0, versions[rank])
        except RuntimeError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(come, range(3)))
    text = "weight group: NCCL 2.27.5 on rank 1, 2; 2.28.3 on rank 0: all must run one release; install the same"
    assert all(each.startswith(text) if refused else not each for each in said), said


@pytest.mark.parametrize("says", ["torch", "library", "headers"])
def test_the_release_is_that_of_the_library(monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """Not that of the headers, unless torch does not say and has no library beside it."""

    def library(name: str) -> Any:
        if says == "headers":
            raise OSError(name)
        return SimpleNamespace(ncclGetVersion=lambda code: setattr(code._obj, "value", 23004))

    here = {"get_runtime_nccl_version": staticmethod(lambda: (2, 30, 4))} if says == "torch" else {}
    monkeypatch.setattr(dist, "ProcessGroupNCCL", type("ProcessGroupNCCL", (), here), raising=False)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(nccl.ctypes, "CDLL", library)
    assert nccl.nccl_version() == ("2.28.9" if says == "headers" else "2.30.4")


def test_a_worker_makes_the_group_without_what_vllm_pins(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """rollout.batch_invariant: the trainers have no pins. vLLM's modules are stand-ins."""

    @contextmanager
    def unpinned() -> Iterator[None]:
        pinned = os.environ.pop("NCCL_PROTO")
        yield
        os.environ["NCCL_PROTO"] = pinned

    engine = type("WeightTransferEngine", (), {"__class_getitem__": classmethod(lambda cls, kinds: cls)})
    for module, names in {
        "vllm.distributed.weight_transfer.base": {
            "WeightTransferEngine": engine,
            "WeightTransferInitInfo": object,
            "WeightTransferUpdateInfo": object,
        },
        "vllm.model_executor.model_loader.reload": dict.fromkeys(
            ["initialize_layerwise_reload", "finalize_layerwise_reload"]
        ),
        "vllm.utils.nccl": {"unpinned_nccl_env": unpinned},
        "megarl.server.vllm_reload": dict.fromkeys(
            ["ReloadPlan", "abandon_reload", "fingerprint", "fingerprint_of_folder", "reload_folder"]
        ),
    }.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**names))
    name = "megarl.server.weight_receiver"
    monkeypatch.setitem(sys.modules, name, None)  # put back at the end, also where it was not imported
    del sys.modules[name]
    module = importlib.import_module(name)
    seen: list[str | None] = []
    monkeypatch.setattr(module, "WeightGroup", lambda *_: seen.append(os.environ.get("NCCL_PROTO")))
    monkeypatch.setattr(module, "manifest_from", lambda *_: None)
    monkeypatch.setenv("NCCL_PROTO", "Simple")
    receiver = module.WeightReceiver()
    parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
    receiver.vllm_config, receiver.device = SimpleNamespace(parallel_config=parallel), "cuda:0"
    receiver.init_transfer_engine(
        module.SyncInit("127.0.0.1", store.port, "test", 2, 1, 1, 5.0, "reshard", False, False, {})
    )
    assert (seen, os.environ["NCCL_PROTO"]) == ([None], "Simple")


def test_who_does_not_come_is_named(store: dist.TCPStore) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1, 2 did not come within 0\.1 s"):
        nccl.meet(store, 0, 3, 0.1, "2.28.3")


def test_torch_does_not_end_the_process_for_a_lost_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its watchdog does by default; the groups of training keep it."""
    seen: list[str | None] = []

    class Made:
        class Options:
            _timeout = timedelta(0)

        def __init__(self, *arguments: Any) -> None:
            seen.append(os.environ.get(nccl.WATCHDOG))

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Made, raising=False)
    for before in (None, "1"):
        monkeypatch.delenv(nccl.WATCHDOG, raising=False)
        if before:
            monkeypatch.setenv(nccl.WATCHDOG, before)
        nccl._make(None, 0, 1, 5)  # type: ignore[arg-type]
        assert (seen.pop(), os.environ.get(nccl.WATCHDOG)) == ("0", before)
