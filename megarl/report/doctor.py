"""`megarl doctor`: what this machine and this environment give, and whether they fit what setup.py asks for.

An environment may hold the trainer's side, the rollout side or both: what is there is judged.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import warnings
from collections import defaultdict

import psutil
from packaging.requirements import Requirement

from megarl.errors import UserError
from megarl.launch.gpus import refuse_lost_gpu
from megarl.server import vllm_release


def doctor(rollout_python: str | None = None) -> int:
    """Prints the findings; returns 0 if what is here works, else 1. rollout_python: the Python that runs the servers,
    where it is not this one; with a trainer here it is asked for the other side.
    """
    trains, rolls_out = _release("megatron-core") is not None, bool(vllm_release.installed())
    asked = rollout_python if trains else None
    problems = _here(trains, rolls_out and not asked)
    if asked:
        problems += _ask(asked)
    if not trains and not rolls_out:
        problems.append("neither megatron-core nor vLLM is installed")
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        print(
            f"not ready: {len(problems)} problem(s); bash tools/setup.sh makes a working environment for a CPU, "
            "docs/gpu.md says what one for a GPU needs"
        )
    elif trains and not rolls_out and not asked:
        print("ready: trainer side only; launch.rollout_python, or ROLLOUT_PYTHON, names the Python that holds vLLM")
    else:
        print("ready" if trains else "ready: rollout side only")
    return 1 if problems else 0


def _here(trainer: bool, rollout: bool) -> list[str]:
    """What is wrong with these sides of this environment."""
    warnings.simplefilter("ignore")  # megatron-core's, about apex and Transformer Engine
    problems = _versions()
    if _release("torch") is None:
        return [*problems, "torch is not installed"]
    try:
        problems += _machine()
    except UserError as error:  # what follows would be judged for a CPU
        return [*problems, str(error)]
    problems += _trainer() if trainer else []
    problems += _rollout() if rollout else []
    return problems


def _ask(python: str) -> list[str]:
    """The rollout side, of another Python."""
    print(f"rollout side, by {python}:", flush=True)
    try:
        asked = subprocess.run([python, "-m", "megarl.report.doctor"], capture_output=True, text=True)
    except OSError as error:
        return [f"{python}: {error.strerror}"]
    for line in asked.stdout.splitlines():
        print(f"  {line}")
    if asked.returncode == 0:
        return []
    last = asked.stderr.strip().rpartition("\n")[2]
    return [f"the rollout side of {python} does not work" + (f": {last}" if last and not asked.stdout else "")]


def _line(name: str, value: object) -> None:
    print(f"{name:24} {value}")


def _release(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[str]:
    """Asked for against found. What an extra asks for is a range that ran: outside of it is a warning."""
    _line("python", platform.python_version())
    asked: dict[str, list[Requirement]] = defaultdict(list)
    for requirement in map(Requirement, importlib.metadata.requires("megarl") or []):
        asked[requirement.name].append(requirement)
    problems = []
    for name, requirements in asked.items():
        installed, needed = _release(name), any(requirement.marker is None for requirement in requirements)
        wanted = " or ".join(sorted({str(requirement.specifier) for requirement in requirements}))
        if installed is not None:
            _line(name, installed)
        elif needed:
            problems.append(f"{name}{wanted} is not installed")
        if installed is None or any(one.specifier.contains(installed, prereleases=True) for one in requirements):
            continue
        line = f"{name} {installed} is installed, megarl asks for {wanted}"
        if needed:
            problems.append(line)
        else:
            _line("warning", line)
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
        refuse_lost_gpu(torch.version.cuda)
    return [] if torch.distributed.is_available() else ["this torch has no torch.distributed"]


def _trainer() -> list[str]:
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
        return [f"megatron-core does not import: {error}"]
    return []


def _rollout() -> list[str]:
    import torch

    problems = []
    try:
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


if __name__ == "__main__":  # the Python of the rollout servers, asked by the trainer's
    found = _here(False, True) if vllm_release.installed() else ["vLLM is not installed there"]
    for problem in found:
        print(f"problem: {problem}")
    sys.exit(1 if found else 0)
