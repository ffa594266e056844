"""Builds shim.cpp once for each torch, and loads it. Imports no torch: torch asks for its CUDA hooks once, while it is
imported.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megarl.errors import UserError

SOURCE = Path(__file__).with_name("shim.cpp")
SCRATCH_SUFFIX = ".new"


def load_shim() -> None:
    """Before torch is imported. UserError where there is no compiler, or a torch that has CUDA of its own."""
    assert "torch" not in sys.modules, "the simulated device must be there before torch is imported"
    ctypes.CDLL(str(built_shim()), mode=ctypes.RTLD_GLOBAL)


def built_shim() -> Path:
    """The library for the torch of this environment, built where it is not there yet (some ten seconds)."""
    folder = _torch_folder()
    version = _version(folder)
    text = SOURCE.read_bytes()
    name = f"simulated_cuda_{version}_{hashlib.sha256(text + str(folder).encode()).hexdigest()[:12]}.so"
    library = _cache() / name
    if not library.exists():
        _build(folder, library)
    return library


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("--trace runs the engine, which needs torch; it is not installed here")
    return Path(next(iter(spec.submodule_search_locations)))


def _version(folder: Path) -> str:
    """Of torch, from its own version.py; a build for CUDA registers its own hooks, and two would end the process."""
    values: dict[str, object] = {}
    exec((folder / "version.py").read_text("utf-8"), values)
    if values["cuda"] is not None:
        raise UserError(
            f"--trace needs torch's build for CPUs, and torch {values['__version__']} here is built for CUDA, as in "
            "the container; run it, on any machine, in an environment that tools/setup.sh made with Python 3.11"
        )
    return str(values["__version__"])


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megarl"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _build(folder: Path, library: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise UserError("--trace compiles megarl/simulate/shim.cpp once, and there is no C++ compiler; install g++")
    made = library.with_suffix(f".{os.getpid()}{SCRATCH_SUFFIX}")
    include, libraries = folder / "include", folder / "lib"
    command = [compiler, "-O0", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(made), f"-I{include}"]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        made.unlink(missing_ok=True)
        why = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip()[-200:])
        raise UserError(f"--trace could not compile megarl/simulate/shim.cpp by {compiler}: {why}")
    made.rename(library)  # whole or not at all
