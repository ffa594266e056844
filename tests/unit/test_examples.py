"""The configurations and scripts of examples/: nothing in them is refused, and node.sh starts what it says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.config import load_config
from megarl.door import RUN_SECRET
from megarl.refusals import REFUSALS
from megarl.refusals.case import Case

MULTI_NODE = Path(__file__).parents[2] / "examples" / "multi_node"
ROPE = {
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
# What decides a layout in the released config.json.
QWEN3_30B: dict[str, Any] = {
    **ROPE,
    **dict(
        model_type="qwen3_moe",
        num_hidden_layers=48,
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
    ),
    **dict(
        intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, vocab_size=151936
    ),
}
QWEN3_235B: dict[str, Any] = QWEN3_30B | dict(
    num_hidden_layers=94, hidden_size=4096, num_attention_heads=64, intermediate_size=12288, moe_intermediate_size=1536
)


@pytest.mark.parametrize(
    ("name", "hf", "trainer_nodes"), [("qwen3_30b_a3b", QWEN3_30B, 2), ("qwen3_235b_a22b", QWEN3_235B, 16)]
)
def test_the_layout_fits_the_model(name: str, hf: dict[str, Any], trainer_nodes: int) -> None:
    config = load_config(MULTI_NODE / f"{name}.yaml")
    case = Case("train", config, 8 * trainer_nodes, hf)
    checked = [
        refusal
        for refusal, commands in REFUSALS
        if "train" in commands and not refusal.__module__.endswith(("files", "model_folder", "server"))
    ]
    assert len(checked) > 10
    for refusal in checked:
        assert refusal(case) is None
    assert config.rollout.engines * config.rollout.tp % 8 == 0


@pytest.fixture
def node(tmp_path: Path) -> Any:
    """Runs node.sh with Pythons that only write down how they were called, but for the line that reads CONFIG; torchrun
    and megarl are those of another environment.
    """
    for command in ("python", "rollout-python", "torchrun", "megarl"):
        script = tmp_path / command
        script.write_text(
            f'#!/bin/bash\n[ "$1" != -c ] || exec {sys.executable} "$@"\n'
            f'echo "{command} GPUS=${{CUDA_VISIBLE_DEVICES-none}} $*"\n[ "$4" != "$FAIL" ] || exit ${{STATUS:-3}}\n'
        )
        script.chmod(0o755)
    (tmp_path / "run.yaml").write_text((MULTI_NODE / "qwen3_30b_a3b.yaml").read_text())

    def run(number: int, **env: str) -> subprocess.CompletedProcess[str]:
        overrides = "launch.store=first:29600 train.lr=1e-5"
        env = {"ROLLOUT_PYTHON": "rollout-python"} | env
        here = {"CONFIG": str(tmp_path / "run.yaml"), "TRAINERS": "2", "HEAD": "first", "OVERRIDES": overrides}
        env = {**os.environ, **here, "SLURM_NODEID": str(number), "PATH": f"{tmp_path}:{os.environ['PATH']}", **env}
        env.pop("CUDA_VISIBLE_DEVICES", None)
        return subprocess.run(
            ["bash", str(MULTI_NODE / "node.sh")], env=env, capture_output=True, text=True, timeout=60
        )

    return run


def test_what_a_node_starts(node: Any, tmp_path: Path) -> None:
    rest = f"{tmp_path}/run.yaml launch.store=first:29600 train.lr=1e-5"
    trainer = node(1)
    where = "--nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr first --master-port 29500 --max-restarts 3"
    assert (
        trainer.stdout == f"python GPUS=none -m torch.distributed.run {where} -m megarl.train {rest}\n"
        and trainer.returncode == 0
    )
    assert "--master-port 29500 --max-restarts 0 -m" in node(1, TRAINER_RESTARTS="0").stdout
    servers = node(2)
    assert sorted(servers.stdout.splitlines()) == [
        f"rollout-python GPUS={gpus} -m megarl rollout {rest}" for gpus in ("0,1", "2,3", "4,5", "6,7")
    ]
    assert servers.returncode == 0
    assert node(3).stdout == ""  # all four engines have a place


@pytest.mark.parametrize(("status", "starts", "ends"), [(3, 8, 0), (2, 4, 2)])
def test_a_worker_that_failed_is_started_again(node: Any, tmp_path: Path, status: int, starts: int, ends: int) -> None:
    failed = node(2, FAIL=f"{tmp_path}/run.yaml", STATUS=str(status), RESTARTS="1")
    assert failed.returncode == ends and len(failed.stdout.splitlines()) == starts


def test_a_node_that_is_asked_to_end_ends_its_workers(node: Any, tmp_path: Path) -> None:
    command = tmp_path / "rollout-python"
    command.write_text(
        f"#!/bin/bash\ntrap 'echo drained; exit 0' TERM\necho $PPID >> {tmp_path}/up\nwhile :; do sleep 0.1; done\n"
    )

    def end() -> None:
        until = time.monotonic() + 30
        while not (tmp_path / "up").is_file() or len((tmp_path / "up").read_text().splitlines()) < 4:
            assert time.monotonic() < until
            time.sleep(0.05)
        serve = int((tmp_path / "up").read_text().splitlines()[0])
        os.kill(int(Path(f"/proc/{serve}/stat").read_text().split()[3]), signal.SIGTERM)

    thread = threading.Thread(target=end)
    thread.start()
    ended = node(2)
    thread.join()
    assert ended.returncode == 0 and ended.stdout.splitlines() == ["drained"] * 4


def test_rank_0_is_where_launch_store_is() -> None:
    """torchrun's c10d rendezvous numbers nodes by their names; and its command starts the Python that it belongs to."""
    root, run = MULTI_NODE.parents[1], re.compile(r"^ +.*torch\.distributed\.run.*(?:\\\n.*)*", re.M)
    paths = (root / "README.md", root / "docs" / "gpu.md", MULTI_NODE / "node.sh")
    for path in paths:
        text = path.read_text()
        [line] = run.findall(text)
        assert "--node-rank" in line and "--master-addr" in line, path
        assert not re.search(r"^ *(exec )?torchrun |rdzv-backend", text, re.M), path


def test_the_manifests_are_yaml_and_agree() -> None:
    manifests = (MULTI_NODE / "kubernetes.yaml").read_text()
    service, job = yaml.safe_load_all(manifests)
    spec = job["spec"]["template"]["spec"]
    env = {entry["name"]: entry.get("value") for entry in spec["containers"][0]["env"]}
    [token] = [entry for entry in spec["containers"][0]["env"] if entry["name"] == RUN_SECRET]
    key = token["valueFrom"]["secretKeyRef"]
    assert f"create secret generic {key['name']} --from-literal={key['key']}=" in manifests
    assert (
        spec["subdomain"] == service["metadata"]["name"]
        and service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    )
    assert (
        env["HEAD"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}" and env["HEAD"] in env["OVERRIDES"]
    )
    assert int(env["TRAINERS"]) < job["spec"]["completions"]
    user = re.findall(r"^USER (\d+)$", (MULTI_NODE.parents[1] / "Dockerfile").read_text(), re.M)[-1]
    assert spec["securityContext"]["fsGroup"] == int(user), "it may not write /runs"
    for script in ("node.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", str(MULTI_NODE / script)], check=True)
