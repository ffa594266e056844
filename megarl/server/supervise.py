"""The process of one vLLM server: its command line, its environment, its start and its end."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import torch

from megarl import door
from megarl.addresses import set_interface
from megarl.checkpoints import hf_files, is_hf_folder
from megarl.config import Config
from megarl.errors import UserError
from megarl.launch import kv_cache
from megarl.launch.gpus import gpu_bytes, refuse_lost_gpu
from megarl.launch.lifeline import die_with_parent
from megarl.launch.malloc import huge_pages
from megarl.rollout.registry import WorkerInfo
from megarl.server.plugin import BACKEND, FORKS, OWN_SERVER
from megarl.weights.map.weight_map import WeightMap, load_hf_config

CPU_WORKER = "megarl.server.cpu_worker.RolloutWorker"
QUANTIZATION = {"fp8": "fp8_per_tensor"}  # vLLM's names; its "fp8" is for checkpoints that hold it
STOP_S = 4.0  # between SIGTERM and SIGKILL


def check_installed() -> None:
    """Raises UserError unless vLLM will find our plugin."""
    if not any(point.value.startswith("megarl.") for point in entry_points(group="vllm.general_plugins")):
        raise UserError(
            f"megarl is not installed for {sys.executable}, so vLLM cannot load its plugin: run `pip install "
            "--no-deps -e .`"
        )


def api_server() -> str:
    """The module of vLLM that serves: by its newer name, where this release has it. Does not import vLLM."""
    spec = importlib.util.find_spec("vllm")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / "entrypoints" / "launchers" / "api_server" / "entry.py").is_file():
            return "vllm.entrypoints.launchers.api_server.entry"
    return "vllm.entrypoints.openai.api_server"


def server_command(config: Config, here: str, port: int) -> list[str]:
    """The command line of the vLLM server. It listens at `here` alone: whoever reaches it may change its weights."""
    rollout, cuda = config.rollout, torch.cuda.is_available()
    dtype = config.rollout_dtype(on_gpu=cuda)
    length = config.server_context
    command = [sys.executable, "-m", api_server(), "--model", str(hf_files(config.model.path))]
    if not is_hf_folder(config.model.path):  # the trainers' first sync brings the weights
        command += ["--load-format", "dummy"]
    command += ["--host", here, "--port", str(port), "--dtype", dtype, "--tensor-parallel-size", str(rollout.tp)]
    command += ["--max-model-len", str(length), "--max-num-seqs", str(rollout.max_num_seqs), "--enable-prefix-caching"]
    if not cuda:
        # where prefill is chunked, a request with a seed kills the engine there (docs/engines.md)
        batched = max(length, 4096, rollout.max_num_seqs)
        command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(batched)]
    command += [
        "--logprobs-mode",
        "processed_logprobs",
        "--generation-config",
        "vllm",
        "--enable-scale-out",
        "--skip-tokenizer-init",
    ]
    command += ["--weight-transfer-config", json.dumps({"backend": BACKEND}), "--seed", str(config.run.seed)]
    command += ["--middleware", "megarl.server.endpoints.RolloutEndpoint"]
    command += ["--worker-extension-cls", "megarl.server.worker_extension.WorkerExtension"]
    command += ["--disable-uvicorn-access-log", "--disable-log-stats"]
    if config.model.trust_remote_code:
        command += ["--trust-remote-code"]
    if _eager(config):
        command += ["--enforce-eager"]
    if rollout.quantization != "none":
        command += ["--quantization", QUANTIZATION[rollout.quantization]]
    if rollout.kv_cache_dtype != "auto":
        command += ["--kv-cache-dtype", rollout.kv_cache_dtype]
    if config.wants_routes and WeightMap(load_hf_config(config.model.path)).moe_layers:
        command += ["--enable-return-routed-experts"]
    if not cuda:
        return [*command, *_cache(config, cuda), "--block-size", "32", "--worker-cls", CPU_WORKER]
    if config.launch.colocate:  # what is free while the trainer starts as well says nothing
        return [*command, *_cache(config, cuda), "--gpu-memory-utilization", "0.01", "--enable-sleep-mode"]
    return [*command, "--gpu-memory-utilization", str(rollout.gpu_memory_utilization)]


def _eager(config: Config) -> bool:
    eager = config.rollout.enforce_eager
    return not torch.cuda.is_available() if eager is None else eager


def _cache(config: Config, cuda: bool) -> list[str]:
    gib = config.rollout.kv_cache_gib
    if gib is not None:
        size = int(gib * 2**30)
    elif cuda:
        size = kv_cache.colocated_bytes(config, WeightMap(load_hf_config(config.model.path)), gpu_bytes())
    else:
        size = int(kv_cache.ON_A_CPU_GIB * 2**30)
    return ["--kv-cache-memory-bytes", str(size)]


def server_environment(config: Config, store_host: str) -> dict[str, str]:
    """The server's environment: no telemetry, no downloads; on a CPU
    one thread a worker, and the worker inside the engine's process.

    UserError where a GPU was planned for this worker and torch sees none.
    """
    if not torch.cuda.is_available():
        refuse_lost_gpu(torch.version.cuda)
    ours = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        OWN_SERVER: "1",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",  # NVIDIA's containers set it: the router would not be float32
    }
    ours |= set_interface(config.launch.interface, store_host)
    if _eager(config):
        ours["TORCHDYNAMO_DISABLE"] = "1"  # vLLM compiles a few helpers even so, which costs 20 s and a C++ compiler
    if config.rollout.batch_invariant:
        ours["VLLM_BATCH_INVARIANT"] = "1"
    if not torch.cuda.is_available():
        ours |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", **huge_pages()}
        # vLLM's latent attention on a CPU has one head size, blocks of 16 and no prefix cache, which routes need: it
        # runs unfolded.
        ours["VLLM_MLA_DISABLE"] = "1"
        # vLLM keeps its matmul primitives with each weight, so a sync loses them; oneDNN's own cache does not. 50 MB at
        # most: of its default size it grew by 0.6 MB a rollout.
        ours["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "256"
        if config.rollout.tp == 1:
            # no worker process of its own: 10 s and 600 MB less; and the engine's is forked
            ours |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", FORKS: "1"}
    return {**os.environ, **ours}


def start_server(config: Config, info: WorkerInfo, store_host: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts the server in a process group of its own; it dies with this process, however this process dies."""
    supervisor, address = os.getpid(), urlsplit(info.url)
    tokens = {door.SERVER_TOKEN: info.tokens.data, door.SERVER_CONTROL: info.tokens.control}
    return subprocess.Popen(
        server_command(config, address.hostname or "", address.port or 0),
        env=server_environment(config, store_host) | tokens,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: die_with_parent(supervisor, signal.SIGKILL),
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
