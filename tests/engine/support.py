"""A real vLLM server under its supervisor, the run's store it joins, and transformers as the judge of its numbers."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from megarl.door import header
from megarl.rollout import registry
from megarl.rollout.client import RolloutClient, Server
from megarl.rollout.registry import WorkerInfo
from megarl.rollout.sync_leader import Canary, SyncLeader, SyncSettings
from megarl.weights.files.hf_reader import HfReader
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import Param, WeightMap, load_hf_config
from megarl.weights.reshard.manifest import whole_inputs, whole_manifest
from megarl.weights.reshard.outgoing import Slices, whole_buckets
from megarl.weights.reshard.rollout_layout import RolloutLayout
from megarl.weights.transport.send import WeightSender

ROOT = Path(__file__).resolve().parents[2]

EOS = 1
KV_CACHE_BLOCKS = 64  # of 32 tokens: so few that a test can make the scheduler preempt
KV_BYTES = 4 * 2 * 2 * 32 * 4  # of a token in the models of these tests: layers, K and V, heads, their width, float32
START_S = 900  # limit for a server's start on two very busy cores
SUPERVISOR = (
    "import sys; from pathlib import Path; from megarl.config import load_config; "
    "from megarl.server import supervise, worker; "
    "command = supervise.server_command; "
    "faulty = {'megarl.server.worker_extension.WorkerExtension': 'tests.engine.faults.FaultyExtension'}; "
    "supervise.server_command = lambda *args: [faulty.get(word, word) for word in command(*args)]; "
    "config = load_config(None, sys.argv[2:]); logs = Path(config.run.dir) / 'logs'; "
    "sys.exit(worker.run_rollout(config, '127.0.0.1', int(sys.argv[1]), logs))"
)


class Pusher:
    """One trainer rank that has whole tensors and broadcasts them: connect, then any number of pushes."""

    def __init__(
        self,
        store: torch.distributed.Store,
        port: int,
        workers: list[WorkerInfo],
        timeout_s: float,
        staged: bool,
        shared: bool = False,
    ) -> None:
        self.store, self.workers = store, workers
        self.settings = SyncSettings("broadcast", 1, staged, timeout_s, shared)
        self.leader = SyncLeader(workers, "127.0.0.1", port, self.settings)

    def connect(self, weights: dict[str, torch.Tensor], agreeing: list[str] | None = None) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        described = shapes, dict.fromkeys(shapes, torch.float32), 2**19  # several buckets for a model of 2 MB
        self.manifest = whole_manifest(*described)
        name = uuid.uuid4().hex
        world = 1 + sum(worker.tp for worker in self.workers)

        def join() -> WeightSender:
            return WeightSender(
                self.store, name, 0, world, self.settings.timeout_s, torch.device("cpu"), self.settings.shared
            )

        self.sender = self.leader.init(name, whole_inputs(*described), join, True, agreeing)

    def load(self, weights: dict[str, torch.Tensor], canary: list[int] | None = None) -> list[Canary]:
        """As far as loaded: no version is committed yet."""
        buckets = whole_buckets(weights.items(), self.manifest)
        self.leader.push(lambda: self.sender.send(buckets), canary or [], self.sender.close)
        return self.leader.loaded()

    def push(self, weights: dict[str, torch.Tensor], version: int) -> None:
        self.load(weights)
        self.leader.commit(version)


class SlicePusher:
    """One trainer rank that holds a whole model and sends every worker its slices."""

    def __init__(self, store: torch.distributed.TCPStore, workers: list[WorkerInfo], model: Path) -> None:
        self.weight_map = WeightMap(load_hf_config(model))
        rollout = RolloutLayout(len(workers), registry.common_tp(workers))
        self.slices = Slices(self.weight_map, Layout(), rollout, torch.float32, 0)
        settings = SyncSettings("reshard", self.slices.senders, True, 60)
        self.leader = SyncLeader(workers, "127.0.0.1", store.port, settings)
        name, world = uuid.uuid4().hex, settings.senders + rollout.world

        def join() -> WeightSender:
            return WeightSender(store, name, 0, world, settings.timeout_s, torch.device("cpu"))

        self.sender = self.leader.init(name, self.slices.manifest_inputs, join, remember_disk=True)

    def push(self, model: Path, version: int) -> None:
        with HfReader(model) as reader:
            params = [(param, _filled(param, reader)) for param in self.weight_map.params(Layout(), Layout().coord(0))]
        self.leader.push(lambda: self.sender.send(self.slices.buckets(params)), [], self.sender.close)
        self.leader.loaded()
        self.leader.commit(version)


def _filled(param: Param, reader: HfReader) -> torch.Tensor:
    tensor = torch.zeros(param.shape)
    for piece in param.pieces:
        tensor[piece.local.slices] = reader.read(piece)
    return tensor


@dataclass
class Rollout:
    """Supervisors, their servers, and the trainer's side of both."""

    store: torch.distributed.TCPStore
    supervisors: list[subprocess.Popen[bytes]]
    workers: list[WorkerInfo] = field(default_factory=list)
    version: int = 0
    pusher: Pusher | None = None

    @functools.cached_property
    def client(self) -> RolloutClient:
        return RolloutClient(self.workers, timeout_s=120)

    def connect(
        self,
        checkpoint: Path,
        timeout_s: float = 60,
        workers: list[WorkerInfo] | None = None,
        staged: bool = True,
        shared: bool = False,
        agreeing: list[str] | None = None,
    ) -> Pusher:
        pusher = Pusher(self.store, self.store.port, workers or self.workers, timeout_s, staged, shared)
        pusher.connect(load_file(checkpoint / "model.safetensors"), agreeing)
        return pusher

    def load(self, checkpoint: Path) -> None:
        """Pushes a checkpoint's tensors under the next version. A test
        that connects by itself drops `pusher` afterwards.
        """
        self.pusher = self.pusher or self.connect(checkpoint)
        self.version += 1
        self.pusher.push(load_file(checkpoint / "model.safetensors"), self.version)

    def fault(self, kind: str, name: str = "", worker: int = 0) -> None:
        """Arms a fault of tests.engine.faults in all workers of one server."""
        self.call("fault", kind, name, worker=worker)

    def call(self, method: str, *args: Any, worker: int = 0, **kwargs: Any) -> list[Any]:
        """What `method` returns in each worker of one server: vLLM's own control route, which only tests turn on."""
        info = self.workers[worker]
        server = Server(info.url, 120, info.tokens.control)
        try:
            return json.loads(server.post("/collective_rpc", {"method": method, "args": args, "kwargs": kwargs}))[
                "results"
            ]
        finally:
            server.close()


@contextlib.contextmanager
def supervised(model: Path, run_dir: Path, engines: int = 1, tp: int = 1, wait: bool = True) -> Iterator[Rollout]:
    store = registry.open_store("127.0.0.1", 0, is_master=True, timeout_s=60)
    keys = [
        f"model.path={model}",
        f"run.dir={run_dir}",
        "rollout.max_prompt_tokens=96",
        "rollout.max_new_tokens=32",
        f"rollout.kv_cache_gib={KV_CACHE_BLOCKS * 32 * KV_BYTES / 2**30}",
        "run.seed=3",
        f"rollout.tp={tp}",
        f"rollout.start_timeout_s={START_S}",
        "launch.max_restarts=0",
    ]
    command = [sys.executable, "-c", SUPERVISOR, str(store.port), *keys]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_SERVER_DEV_MODE": "1"}
    rollout = Rollout(store, [subprocess.Popen(command, env=environment) for _ in range(engines)])
    try:
        if wait:
            rollout.workers = registry.wait_for_workers(store, engines, START_S)
        yield rollout
        registry.request_shutdown(store, rollout.workers)
        assert not any(supervisor.wait(60) for supervisor in rollout.supervisors if supervisor.poll() is None)
    finally:
        for supervisor in rollout.supervisors:
            supervisor.terminate()
        for supervisor in rollout.supervisors:
            supervisor.wait(60)


@functools.lru_cache(4)
def _judge(checkpoint: Path) -> torch.nn.Module:
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@torch.no_grad()
def judged(checkpoint: Path, tokens: list[int], temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """transformers' log-probabilities [T-1] of tokens 1.. and sorted top-k experts [T-1, L, K] of tokens ..T-2."""
    model = _judge(checkpoint)
    out = model(input_ids=torch.tensor([tokens]), output_router_logits=True)
    logprobs = (
        (out.logits[0].double() / temperature).log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    )
    experts = [
        layer.softmax(-1).topk(model.config.num_experts_per_tok, -1).indices.sort(-1).values
        for layer in out.router_logits
    ]
    return logprobs.float().numpy(), torch.stack(experts, 1)[:-1].numpy()


def agent_asks(info: WorkerInfo, tokens: list[int]) -> dict[str, Any]:
    """One response of four tokens by vLLM's own route, with the token of an agent that only samples."""
    body = {"token_ids": tokens, "sampling_params": {"max_tokens": 4, "temperature": 1.0, "logprobs": 0}}
    headers = {**header(info.tokens.data), "Content-Type": "application/json"}
    request = urllib.request.Request(f"{info.url}/inference/v1/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["choices"][0]


def prompts(count: int, length: int) -> list[list[int]]:
    """Different prompts of one length."""
    return [[3 + (7 * i + j * (1 + i % 5)) % 21 for j in range(length)] for i in range(count)]
