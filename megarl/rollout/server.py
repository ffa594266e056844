"""`megarl rollout CONFIG`: starts one vLLM server, registers it in the run's store, watches it, and leaves no process behind."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from megarl.config import Config
from megarl.errors import UserError
from megarl.rollout import coordinator
from megarl.rollout.coordinator import WorkerInfo

CANARY_TOKENS = 64  # a weight sync is checked by scoring this many tokens: the server's context holds them and one more
TAIL_LINES = 15
STOP_S = 4.0  # between SIGTERM and SIGKILL
PR_SET_PDEATHSIG = 1


class _Stopped(Exception):
    """SIGTERM or SIGINT reached the supervisor, or the one who started it died."""


def run_rollout(config: Config, store_host: str, store_port: int) -> int:
    """Runs until the trainers ask it to stop (returns 0), a signal comes (130), or the server or the store is lost (1, with one line on stderr)."""
    check_installed()
    parent = os.getppid()

    def stop(*_: object) -> None:
        raise _Stopped

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    child = log = None
    try:
        log = _open_log(config)
        port = _free_port()
        child = start_server(config, port, log)
        return _supervise(config, child, log, port, store_host, store_port, parent)
    except _Stopped:
        return 130
    finally:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)
        if child is not None:
            stop_server(child)
        if log is not None:
            log.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_installed() -> None:
    """Raises UserError unless vLLM will find our plugin."""
    if not any(point.value.startswith("megarl.") for point in entry_points(group="vllm.general_plugins")):
        raise UserError(f"megarl is not installed for {sys.executable}, so vLLM cannot load its plugin: run `pip install --no-deps -e .`")


def server_command(config: Config, port: int) -> list[str]:
    """The command line of the vLLM server."""
    rollout = config.rollout
    dtype = rollout.dtype if rollout.dtype != "auto" else config.engine.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    length = max(rollout.max_prompt_tokens + rollout.max_new_tokens, CANARY_TOKENS + 1)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", config.model.path]
    command += ["--host", "0.0.0.0", "--port", str(port), "--dtype", dtype, "--tensor-parallel-size", str(rollout.tp)]
    command += ["--max-model-len", str(length), "--max-num-seqs", str(rollout.max_num_seqs), "--enable-prefix-caching"]
    # A request with a seed kills the engine where prefill is chunked (spec/engines.md): every prompt goes in at once.
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(length, 4096))]
    command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--enable-scale-out", "--skip-tokenizer-init"]
    command += ["--weight-transfer-config", json.dumps({"backend": "megarl"}), "--seed", str(config.run.seed)]
    command += ["--middleware", "megarl.rollout.endpoint.RolloutEndpoint"]
    command += ["--worker-extension-cls", "megarl.rollout.extension.WorkerExtension"]
    command += ["--disable-uvicorn-access-log", "--disable-log-stats"]
    if rollout.enforce_eager:
        command += ["--enforce-eager"]
    if config.wants_routes:
        command += ["--enable-return-routed-experts"]
    if torch.cuda.is_available():
        command += ["--gpu-memory-utilization", str(rollout.gpu_memory_utilization)]
    else:
        command += ["--kv-cache-memory-bytes", str(int(rollout.kv_cache_gib * 2**30)), "--block-size", "32"]
        if config.wants_routes:
            command += ["--worker-cls", "megarl.rollout.cpu_worker.RouteCapturingWorker"]
    return command


def server_environment() -> dict[str, str]:
    """The server's environment: no telemetry, no downloads, one thread a CPU worker, our plugin allowed."""
    ours = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if torch.cuda.is_available():
        del ours["OMP_NUM_THREADS"], ours["VLLM_CPU_OMP_THREADS_BIND"]
    return {**os.environ, **ours}


def start_server(config: Config, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts the server in a process group of its own; it dies with this process, however this process dies."""
    supervisor = os.getpid()
    libc = ctypes.CDLL(None)  # loaded before the fork

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:
            os._exit(1)

    return subprocess.Popen(
        server_command(config, port),
        env=server_environment(),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def stop_server(child: subprocess.Popen[bytes]) -> None:
    """Ends the server's whole process group: politely, then for certain. Takes at most STOP_S and a little."""
    deadline = time.monotonic() + STOP_S
    _signal_group(child.pid, signal.SIGTERM)
    while time.monotonic() < deadline and (child.poll() is None or _signal_group(child.pid, 0)):
        time.sleep(0.05)
    _signal_group(child.pid, signal.SIGKILL)
    child.wait()


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
        return True
    except ProcessLookupError:
        return False


def _supervise(config: Config, child: subprocess.Popen[bytes], log: IO[bytes], port: int, host: str, store_port: int, parent: int) -> int:
    store = _join(config, child, parent, host, store_port)
    index = coordinator.claim_index(store)
    path = Path(log.name).with_name(f"rollout_{index}.log")
    os.replace(log.name, path)
    here = _address(host)
    info = WorkerInfo(index, f"http://{here}:{port}", config.rollout.tp, child.pid, socket.gethostname(), str(path))
    registered, next_beat = False, 0.0
    deadline = time.monotonic() + config.rollout.start_timeout_s
    try:
        while True:
            if child.poll() is not None:
                return _failed(store, info, f"ended with status {child.returncode}")
            if not registered and time.monotonic() > deadline:
                return _failed(store, info, f"did not answer within rollout.start_timeout_s = {config.rollout.start_timeout_s:.0f} s")
            if not registered and _healthy(port):
                coordinator.register_worker(store, info)
                registered = True
            if time.monotonic() >= next_beat:
                coordinator.heartbeat(store, index)
                if coordinator.shutdown_requested(store):
                    stop_server(child)
                    coordinator.worker_left(store, index)
                    return 0
                next_beat = time.monotonic() + coordinator.BEAT_S
            _check_parent(parent)
            time.sleep(0.1)
    except dist.DistError:
        print(f"megarl: error: rollout worker {index}: the run's store {host}:{store_port} is gone, stopping", file=sys.stderr)
        return 1


def _join(config: Config, child: subprocess.Popen[bytes], parent: int, host: str, port: int) -> dist.TCPStore:
    """Connects to the run's store, which may come up after this worker did."""
    deadline = time.monotonic() + config.rollout.start_timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return coordinator.open_store(host, port, is_master=False, timeout_s=5)
        except OSError:
            if time.monotonic() > deadline:
                raise UserError(f"run store {host}:{port}: nothing answered: start the trainers, or correct launch.store") from None
        if child.poll() is not None and time.monotonic() + 30 < deadline:
            deadline = time.monotonic() + 30  # the server is gone already: wait only to say so
        _check_parent(parent)
        time.sleep(0.2)


def _check_parent(parent: int) -> None:
    if os.getppid() != parent and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup the parent may go
        raise _Stopped


def _failed(store: dist.Store, info: WorkerInfo, what: str) -> int:
    tail = log_tail(Path(info.log))
    line = f"rollout worker {info.index} (pid {info.pid} on {info.host}): the vLLM server {what}; last lines of {info.log}:"
    coordinator.report_failure(store, info.index, f"{line}\n{tail}")
    print(f"megarl: error: {line}\n{tail}", file=sys.stderr)
    return 1


def log_tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, read from its end."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64 * 1024))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def _open_log(config: Config) -> IO[bytes]:
    folder = Path(config.run.dir) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / f"rollout_pid{os.getpid()}.log", "wb")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _address(store_host: str) -> str:
    """The address by which the trainers reach this machine: the one that routes to the store."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((store_host, 1))
        return probe.getsockname()[0]


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
