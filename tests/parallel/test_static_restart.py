"""torchrun --max-restarts under the static rendezvous, of two torchruns as on two hosts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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

# as every rank of megarl under torchrun: they meet before they make process groups. One ends before it does.
PEERS = """
import os, sys
from pathlib import Path

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == sys.argv[2]:
    os._exit(1)
from megarl.launch.joined import run_joined

def run():
    print("met", os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
    return 0

run_joined(Path(sys.argv[1]), None, "127.0.0.1", lambda: None, run)
"""


def test_ranks_that_torchrun_starts_again_meet_again(tmp_path: Path) -> None:
    for rank, (status, out) in enumerate(two_nodes(tmp_path, RANK)):
        assert status == 0 and f"met {rank}" in out, out[-3000:]


@pytest.mark.parametrize("ended", ["0", "1"])
def test_nodes_whose_counts_drifted_apart_meet_again(tmp_path: Path, ended: str) -> None:
    """A rank was killed during its imports, of which the other node knew nothing: each start met nobody for 300 s."""
    for rank, (status, out) in enumerate(two_nodes(tmp_path, PEERS, str(tmp_path / "logs"), ended)):
        if rank:  # rank 0 keeps the terminal
            out = (tmp_path / "logs" / f"trainer_{rank}.log").read_text()
        assert status == 0 and f"met {rank} 1\n" in out, out[-3000:]


def two_nodes(tmp_path: Path, code: str, *arguments: str) -> list[tuple[int, str]]:
    """Exit status and output of each node's torchrun."""
    script = tmp_path / "rank.py"
    script.write_text(code)
    port = reserve_port("127.0.0.1")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=2"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    nodes = [
        subprocess.Popen(
            [*command, f"--node-rank={node}", str(script), *arguments],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        outs = [node.communicate(timeout=200)[0] for node in nodes]
        return [(node.returncode, out) for node, out in zip(nodes, outs, strict=True)]
    finally:
        for node in nodes:
            node.kill()
