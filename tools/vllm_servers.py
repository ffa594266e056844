"""vLLM servers that stay up while one set of trainer ranks after
another syncs into them: what the tools that measure syncs share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.ranks import launch_ranks

if TYPE_CHECKING:
    from megarl.config import Config
    from megarl.engine.build import Engine
    from tools.joined_fleet import JoinedFleet

ROOT = Path(__file__).resolve().parents[1]
START_S = 900  # limit for a server's start on two very busy cores
# the last: the way over the disk asks vLLM to reload by its own control route
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_SERVER_DEV_MODE": "1"}


@contextlib.contextmanager
def servers(
    model: Path, folder: Path, tps: list[int], overrides: list[str]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """One vLLM server of each tensor-parallel size: (port of the run's
    store, of which this process is the master; servers' WorkerInfo).
    """
    from megarl.rollout import registry

    store = registry.open_store("127.0.0.1", 0, is_master=True, timeout_s=60)
    config = folder / "servers.yaml"
    config.write_text("", encoding="utf-8")
    children = []
    for tp in tps:
        keys = [
            f"model.path={model}",
            f"run.dir={folder / f'server_tp{tp}'}",
            f"rollout.tp={tp}",
            f"launch.store=127.0.0.1:{store.port}",
        ]
        keys += [
            "rollout.max_prompt_tokens=96",
            "rollout.max_new_tokens=16",
            f"rollout.start_timeout_s={START_S}",
            *overrides,
        ]
        command = [sys.executable, "-m", "megarl.cli", "rollout", str(config), *keys]
        children.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}))
    try:
        workers = registry.wait_for_workers(store, len(tps), START_S)
        yield (
            store.port,
            [dataclasses.asdict(worker) for worker in workers],
        )
        registry.request_shutdown(store, workers)
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait(30)


def run_ranks(script: str, world: int, work: dict[str, Any]) -> None:
    """`script --ranks WORK` in torchrun ranks. Raises CalledProcessError where one fails."""
    launch_ranks(script, world, "--ranks", json.dumps(work), capture=False).check_returncode()


def join(config: Config, engine: Engine, worker: dict[str, Any], port: int) -> JoinedFleet:
    """Inside a rank: its hold on one of the servers. worker, port: of servers()."""
    from megarl.rollout.registry import from_known
    from tools.joined_fleet import JoinedFleet

    config.launch.store = f"127.0.0.1:{port}"
    return JoinedFleet(config, engine.model.parallel, [from_known(worker)])
