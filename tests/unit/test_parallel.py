"""What megarl asks of megatron-core: its release, its process groups."""

from __future__ import annotations

import ast
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils

from megarl import engine
from megarl.config import load_config
from megarl.engine import parallel
from megarl.engine.device import setup_device
from megarl.engine.megatron_compat import CORE, NEEDED, TESTED, check_release
from megarl.engine.parallel import destroy_parallel, init_parallel


def test_trap_19_every_size_is_passed_and_expert_tensor_parallelism_is_1_under_tp_2(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """megatron-core's own default is ETP = TP. (The gradients of TP2 EP1 ETP1 are a row of tools/equality.py.)"""
    asked: dict[str, int] = {}

    def initialize(**sizes: int) -> None:
        asked.update(sizes)
        raise InterruptedError

    monkeypatch.setattr(parallel_state, "initialize_model_parallel", initialize)
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel, "_leave_groups", lambda: None)
    with pytest.raises(InterruptedError):
        parallel.init_parallel(load_config(None, ["parallel.tp=2"]).parallel, setup_device(), seed=0)
    assert (
        asked["expert_tensor_parallel_size"] == asked["expert_model_parallel_size"] == 1
        and asked["tensor_model_parallel_size"] == 2
    )


IMPORTS = """
import importlib, os, pkgutil, torch
from megatron.core.transformer.moe import moe_utils, token_dispatcher
watched = lambda: (torch.cuda.current_device, torch.cuda.Stream, torch.cuda.synchronize, torch.Tensor.cuda,
                   torch.Tensor.type, token_dispatcher.permute, moe_utils.torch,
                   {key: value for key, value in os.environ.items() if key != "TORCH_CPP_LOG_LEVEL"})
before = watched()
for room in ("engine", "loop", "commands", "replay", "objective", "weights"):
    package = importlib.import_module("megarl." + room)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name != "megarl.engine.te_attention":
            importlib.import_module(module.name)
importlib.import_module("megarl.train")
assert watched() == before
from megarl.engine.device import setup_device
setup_device()
first = watched()
assert first[5] is not before[5] and first[-1] == before[-1]
"""


def test_importing_megarl_changes_nothing_in_torch_and_megatron() -> None:
    """setup_device does, and says nothing to child processes through the environment. TORCH_CPP_LOG_LEVEL alone is set
    by an import: torch reads it while it is imported.
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_gpu_without_transformer_engine_has_the_answers_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were given on a CPU alone: every MoE forward on a GPU was a NameError."""
    monkeypatch.delitem(moe_utils.__dict__, "te_general_gemm", raising=False)
    monkeypatch.setattr(multi_latent_attention, "HAVE_TE", "a mock")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert setup_device().backend == "nccl"
    assert moe_utils.te_general_gemm is None and multi_latent_attention.HAVE_TE is False


def test_nothing_in_megarl_changes_a_configuration() -> None:
    """A resolved configuration is a new one (Config.changed)."""
    found = []
    for path in (Path(__file__).resolve().parents[2] / "megarl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                    key = ast.unparse(part) if isinstance(part, ast.Attribute) else ""
                    if re.fullmatch(r"(self\.)?config\.\w+\.\w+", key) and "server" not in path.parts:
                        found.append(f"{path.name}:{part.lineno}: {key}")
    assert not found


def test_a_release_of_megatron_core_never_seen_is_warned_of_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once in a process, on the first rank; a release that the tests run on in none."""
    for version in ("0.99.0", "0.99.0", *(f"{release}.7" for release in TESTED)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        check_release()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megarl: warning: megatron-core 0.99.0: megarl is tested with ") and "unverified" in line


@pytest.mark.parametrize("gpu", [False, True])
def test_megatron_core_without_a_name_that_is_needed_is_refused(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    """Before anything of it is replaced, on a CPU and on a GPU; the name is said."""
    from megatron.core.pipeline_parallel import schedules

    monkeypatch.delattr(schedules, "get_schedule_table")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    wanted = (
        r"lacks pipeline_parallel\.schedules\.get_schedule_table, which megarl needs; install 0\.16\.x or 0\.19\.x$"
    )
    with pytest.raises(RuntimeError, match=wanted):
        setup_device()


def test_a_private_method_that_is_overridden_is_looked_for() -> None:
    """A release that calls it by another name would go on with its own."""
    overridden, needed = set(), {f"{module}.{name}" for module, names in NEEDED.items() for name in names.split()}
    for found in pkgutil.iter_modules(engine.__path__, f"{engine.__name__}."):
        module = importlib.import_module(found.name)
        for one in vars(module).values():
            if not isinstance(one, type) or one.__module__ != found.name:
                continue
            private = {name for name in vars(one) if re.match("_[a-z]", name)} - {"_abc_impl"}
            for base in one.__mro__[1:]:
                if base.__module__.startswith(CORE):
                    own = f"{base.__module__.removeprefix(CORE)}.{base.__name__}"
                    overridden |= {f"{own}.{name}" for name in private & vars(base).keys()}
    assert len(overridden) > 4 and overridden <= needed


def test_the_groups_of_a_layout_that_is_left_are_destroyed() -> None:
    """Each kept threads that wake a hundred times a second: a quarter of a core a rank after twelve layouts."""
    config, device = load_config(None, []).parallel, setup_device()
    try:
        init_parallel(config, device, 0)
        first = len(dist.distributed_c10d._world.pg_map)
        init_parallel(config, device, 0)
        assert len(dist.distributed_c10d._world.pg_map) == first > 1
    finally:
        destroy_parallel()
