from __future__ import annotations

import dataclasses
import json
import socket
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megarl.config import load_config
from megarl.door import RUN_SECRET
from megarl.errors import UserError
from megarl.rollout import registry
from megarl.rollout import store as store_module
from megarl.rollout.registry import (
    RolloutDied,
    WorkerInfo,
    check_workers,
    open_store,
    request_shutdown,
    wait_for_workers,
)
from megarl.rollout.store import facts, open_run_store, refuse_foreign, refuse_other


def worker(index: int) -> WorkerInfo:
    return WorkerInfo(index, f"http://127.0.0.1:{8000 + index}", 1, 100 + index, "here", "/log")


def test_workers_meet_the_trainer() -> None:
    store = open_store("127.0.0.1", 0, is_master=True, timeout_s=5)
    other = open_store("127.0.0.1", store.port, is_master=False, timeout_s=5)
    assert [registry.claim_index(other) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="0 of 2 rollout workers came within 0 s"):
        wait_for_workers(store, 2, 0.2)
    for index in (2, 0):
        registry.register_worker(other, worker(index))
    found = wait_for_workers(store, 2, 1)
    assert found == [worker(0), worker(2)]

    check_workers(store, found)
    registry.report_failure(other, 0, "rollout worker 0: ended\nlast line")
    other.get("rollout/0/failed")  # TCPStore.set() does not wait for the server: now it has arrived
    with pytest.raises(RolloutDied, match="rollout worker 0: ended\nlast line"):
        check_workers(store, found)
    with pytest.raises(RolloutDied, match="rollout worker 0: ended"):
        wait_for_workers(store, 3, 5)

    assert not registry.shutdown_requested(other)
    registry.worker_left(other, 0)
    start = time.monotonic()
    request_shutdown(store, found, wait_s=0.3)
    assert time.monotonic() - start > 0.2 and registry.shutdown_requested(other)


def test_trainers_that_begin_wait_for_a_server_that_is_started_again() -> None:
    """They were started again themselves, while a worker mends its server; only one that gave up ends the wait."""
    store = open_store("127.0.0.1", 0, is_master=True, timeout_s=5)
    for index in range(3):
        registry.claim_index(store)
        registry.register_worker(store, worker(index))
    registry.report_failure(store, 0, "rollout worker 0: ended", again=True)
    registry.worker_leaves(store, 1)
    assert wait_for_workers(store, 1, 5) == [worker(2)]
    with pytest.raises(UserError, match="1 of 2 rollout workers came"):
        wait_for_workers(store, 2, 0.2)
    assert wait_for_workers(store, 2, 0.2, resumed=True) == [worker(2)], "where the run has lost one for good"


def test_trainers_that_are_started_again_wait_for_no_worker_that_is_lost_for_good(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first checkpoint, too: those that come back say that the run was under way. They waited
    rollout.start_timeout_s for it at every restart, and one that had failed ended the run.
    """
    monkeypatch.setattr(registry, "BACK_S", 0.2)
    store = open_store("127.0.0.1", 0, is_master=True, timeout_s=5)
    assert [registry.claim_index(store) for _ in range(3)] == [0, 1, 2]
    registry.register_worker(store, worker(0))
    registry.register_worker(store, dataclasses.replace(worker(1), back=True))
    registry.report_failure(store, 2, "rollout worker 2: ended; last lines of /log:\nTraceback")
    assert wait_for_workers(store, 3, 3600) == [worker(0), worker(1)]
    said = capsys.readouterr().out
    assert "rollout worker 2: ended; going on without it\n" in said
    assert "2 of 3 rollout workers came: going on with these; others may join\n" in said


def test_workers_that_are_cut_differently_are_named() -> None:
    assert registry.common_tp([worker(0), worker(1)]) == 1
    with pytest.raises(
        UserError,
        match=r"worker 1 \(http://127.0.0.1:8001\) has rollout.tp 2, worker 0 \(\S+8000\) has 1; start all with",
    ):
        registry.common_tp([worker(0), dataclasses.replace(worker(1), tp=2)])


def test_a_store_that_cannot_be_had_is_one_line() -> None:
    store = open_store("127.0.0.1", 0, is_master=True, timeout_s=5)
    with pytest.raises(UserError, match=rf"^run store 127.0.0.1:{store.port}: the port is in use") as caught:
        open_store("127.0.0.1", store.port, is_master=True, timeout_s=5)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"^run store 192.0.2.1:0: .* or this is not host {socket.gethostname()}: give"):
        open_store("192.0.2.1", 0, is_master=True, timeout_s=5)
    with pytest.raises(UserError, match="run store 127.0.0.1:9: nothing answered within 1 s"):
        open_store("127.0.0.1", 9, is_master=False, timeout_s=1)


def test_a_store_that_is_not_this_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "KNOWN_WITHIN_S", 0.0)
    other = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's, say
    with pytest.raises(UserError, match="launch.store here:1: the store there is no run's, but maybe torchrun's own"):
        refuse_foreign(other, "here:1")
    store = open_store("127.0.0.1", 0, is_master=True, timeout_s=5)
    refuse_foreign(store, "here:1")
    monkeypatch.setenv(RUN_SECRET, "another")
    with pytest.raises(UserError, match="the run there has another MEGARL_TOKEN than this worker"):
        refuse_foreign(store, "here:1")
    monkeypatch.delenv(RUN_SECRET)
    with pytest.raises(UserError, match="0 of 1 rollout workers came within 0 s, 1 was refused: start"):
        wait_for_workers(store, 1, 0.0)


def test_rank_0_opens_the_store_and_prints_a_drawn_port(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, (host, port) = open_run_store(load_config(run_yaml), spans_hosts=False)
    assert (host, port) == ("127.0.0.1", store.port)
    assert f"megarl rollout CONFIG launch.store=127.0.0.1:{port}" in capsys.readouterr().out
    refuse_foreign(open_store(host, port, is_master=False, timeout_s=5), "here:1")


def test_a_run_on_several_hosts_without_a_secret_is_told_of(
    run_yaml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "is_loopback", lambda address: False)
    for secret, told in (("", 1), ("of this run", 0)):
        monkeypatch.setenv(RUN_SECRET, secret)
        open_run_store(load_config(run_yaml), spans_hosts=False)
        assert (
            capsys.readouterr().out.count("megarl: warning: MEGARL_TOKEN is not set: whoever reaches 127.0.0.1:")
            == told
        )


def test_a_worker_that_does_not_fit_the_run_is_refused_by_name(
    run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another model, vocabulary, dtype, release of megarl or vLLM, or one that records no routes where they are wanted;
    it ends, both sides say why, and the run goes on waiting."""
    config = load_config(run_yaml, ["engine.dtype=float32"])
    mine = facts(config)
    store, _ = open_run_store(config, spans_hosts=False)
    theirs = refuse_foreign(store, "here:1")
    with pytest.raises(UserError, match="^worker zero does not fit the run: its dtype is bfloat16"):
        refuse_other(store, theirs, mine | {"dtype": "bfloat16"}, "0.9", "worker zero")
    for name in ("one", "two"):  # whose release is the run's: not that of one that was refused
        refuse_other(store, theirs, mine, "1.0", f"worker {name}")
    for change, vllm, why in (
        ({"vocabulary size": 7}, "1.0", f"vocabulary size is 7, the trainers' is {mine['vocabulary size']}"),
        ({"config.json (its digest)": "abc"}, "1.0", r"config.json \(its digest\) is abc"),
        ({"megarl release": "0.0"}, "1.0", "megarl release is 0.0"),
        ({"dtype": "bfloat16"}, "1.0", "dtype is bfloat16, the trainers' is float32"),
        ({"recording of routes": False}, "1.0", "recording of routes is False, the trainers' is True"),
        ({"rollout.quantization": "fp8"}, "1.0", "rollout.quantization is fp8, the trainers' is none"),
        ({"rollout.kv_cache_dtype": "fp8"}, "1.0", "rollout.kv_cache_dtype is fp8"),
        ({"rollout.batch_invariant": True}, "1.0", "rollout.batch_invariant is True, the trainers' is False"),
        ({"context in tokens": 5}, "1.0", f"context in tokens is 5, the trainers' is {mine['context in tokens']}"),
        ({}, "2.0", "vLLM release is 2.0, that of the first worker is 1.0"),
    ):
        with pytest.raises(UserError, match=f"^worker three does not fit the run: its {why}.*start it with the CONFIG"):
            refuse_other(store, theirs, mine | change, vllm, "worker three")
    needs_less = theirs | {"recording of routes": False, "context in tokens": 5}
    refuse_other(store, needs_less, mine, "1.0", "a worker that could do more")
    with pytest.raises(UserError, match="0 of 1 rollout workers came within 0 s, 11 were refused"):
        wait_for_workers(store, 1, 0.0)
    assert capsys.readouterr().out.count("worker three does not fit the run") == 10


def test_the_model_of_a_run_is_known_by_its_config(run_yaml: Path) -> None:
    before = facts(load_config(run_yaml))
    path = run_yaml.parent / "model" / "config.json"
    hf = json.loads(path.read_text())
    path.write_text(json.dumps({"_name_or_path": "elsewhere", **hf}))
    assert facts(load_config(run_yaml)) == before
    path.write_text(json.dumps(hf | {"rms_norm_eps": 0.5}))
    assert facts(load_config(run_yaml)) != before


def test_a_worker_with_an_older_config_is_known_by_what_it_changes(run_yaml: Path) -> None:
    now = facts(load_config(run_yaml, ["rollout.max_new_tokens=4096"]))
    for key in ("max_new_tokens=2048", "quantization=fp8", "kv_cache_dtype=fp8", "batch_invariant=true"):
        before = facts(load_config(run_yaml, ["rollout.max_new_tokens=4096", f"rollout.{key}"]))
        assert [what for what in now if now[what] != before[what]] == [
            f"rollout.{key.partition('=')[0]}" if "max_new" not in key else "context in tokens"
        ]


def test_one_server_that_registers_twice_is_one() -> None:
    store = open_store("127.0.0.1", 0, is_master=True, timeout_s=5)
    first, again = worker(registry.claim_index(store)), worker(0)
    again.index = registry.claim_index(store)
    for info in (first, again):
        registry.register_worker(store, info)
    with pytest.raises(UserError, match="1 of 2 rollout workers came"):
        wait_for_workers(store, 2, 0.0)
    assert wait_for_workers(store, 1, 5) == [again]
