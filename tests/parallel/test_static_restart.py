"""torchrun --max-restarts under the static rendezvous, of two torchruns as on two hosts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megarl.launch.ports import reserve_port

RANK = """
import os, sys
import torch.distributed as dist
from megarl.config import ParallelConfig
from megarl.engine.device import setup_device
from megarl.engine.parallel import destroy_parallel, init_parallel

init_parallel(ParallelConfig(), setup_device(), 0)
dist.barrier()
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
    os._exit(1)
dist.barrier()
print("met", dist.get_rank(), flush=True)
destroy_parallel()
"""


def test_ranks_that_torchrun_starts_again_meet_again(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    port = reserve_port("127.0.0.1")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=2"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    nodes = [
        subprocess.Popen(
            [*command, f"--node-rank={node}", str(script)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        for rank, node in enumerate(nodes):
            out, _ = node.communicate(timeout=200)
            assert node.returncode == 0 and f"met {rank}" in out, out[-3000:]
    finally:
        for node in nodes:
            node.kill()
