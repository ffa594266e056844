"""A real vLLM server under its supervisor, the run's store it joins, and transformers as the judge of its numbers."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from megarl.rollout import coordinator
from megarl.rollout.client import RolloutClient
from megarl.rollout.coordinator import WorkerInfo
from megarl.rollout.sync import BroadcastSync, SyncReport

ROOT = Path(__file__).resolve().parents[2]

EOS = 1
START_S = 240  # limit for a server's start on two busy cores
SUPERVISOR = (
    "import sys; from megarl.config import load_config; from megarl.rollout.server import run_rollout; "
    "sys.exit(run_rollout(load_config(None, sys.argv[2:]), '127.0.0.1', int(sys.argv[1])))"
)


@dataclass
class Rollout:
    """Supervisors, their servers, and the trainer's side of both."""

    store: torch.distributed.TCPStore
    supervisors: list[subprocess.Popen[bytes]]
    workers: list[WorkerInfo] = field(default_factory=list)
    version: int = 0

    @functools.cached_property
    def client(self) -> RolloutClient:
        return RolloutClient([worker.url for worker in self.workers], timeout_s=120)

    @functools.cached_property
    def sync(self) -> BroadcastSync:
        return self.connect(timeout_s=60)

    def connect(self, timeout_s: float, workers: list[WorkerInfo] | None = None) -> BroadcastSync:
        sync = BroadcastSync("127.0.0.1", self.store.port, timeout_s, bucket_bytes=2**19)  # several buckets for a model of 2 MB
        sync.connect(self.store, workers or self.workers, torch.device("cpu"))
        return sync

    def load(self, checkpoint: Path) -> SyncReport:
        """Pushes a checkpoint's tensors under the next version."""
        self.version += 1
        return self.sync.push(load_file(checkpoint / "model.safetensors").items(), self.version)


@contextlib.contextmanager
def supervised(model: Path, run_dir: Path, engines: int = 1, wait: bool = True) -> Iterator[Rollout]:
    store = coordinator.open_store("127.0.0.1", 0, is_master=True, timeout_s=60)
    keys = [f"model.path={model}", f"run.dir={run_dir}", "rollout.max_prompt_tokens=96", "rollout.max_new_tokens=32", "run.seed=3"]
    command = [sys.executable, "-c", SUPERVISOR, str(store.port), *keys]
    rollout = Rollout(store, [subprocess.Popen(command) for _ in range(engines)])
    try:
        if wait:
            rollout.workers = coordinator.wait_for_workers(store, engines, START_S)
        yield rollout
        coordinator.request_shutdown(store, rollout.workers)
        assert not any(supervisor.wait(20) for supervisor in rollout.supervisors if supervisor.poll() is None)
    finally:
        for supervisor in rollout.supervisors:
            supervisor.terminate()
        for supervisor in rollout.supervisors:
            supervisor.wait(20)


@functools.lru_cache(4)
def _judge(checkpoint: Path) -> torch.nn.Module:
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@torch.no_grad()
def judged(checkpoint: Path, tokens: list[int], temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """transformers' log-probabilities [T-1] of tokens 1.. and sorted top-k experts [T-1, L, K] of tokens ..T-2."""
    model = _judge(checkpoint)
    out = model(input_ids=torch.tensor([tokens]), output_router_logits=True)
    logprobs = (out.logits[0].double() / temperature).log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    experts = [layer.softmax(-1).topk(model.config.num_experts_per_tok, -1).indices.sort(-1).values for layer in out.router_logits]
    return logprobs.float().numpy(), torch.stack(experts, 1)[:-1].numpy()


def prompts(count: int, length: int) -> list[list[int]]:
    """Different prompts of one length."""
    return [[3 + (7 * i + j * (1 + i % 5)) % 21 for j in range(length)] for i in range(count)]
