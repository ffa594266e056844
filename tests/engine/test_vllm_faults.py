"""Faults of vLLM 0.32 on a CPU that our plugin mends in every vLLM process: experts stay unpacked, and an output layer
that is the embedding stays as it was, when weights are replaced in place; queries with an axis of heads are rotated
wrongly.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.engine.support import ROOT
from tests.engine.together import REQUESTS
from tools.tiny_model import make_tiny_model


def reload_error(a: Path, b: Path, plugins: str) -> float:
    """Largest error of a log-probability after an in-place reload, with
    the named plugins of vllm.general_plugins loaded.
    """
    environment = {
        **os.environ,
        "VLLM_PLUGINS": plugins,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.engine.inplace_reload", str(a), str(b)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    found = re.search(r"^worst=(\S+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return float(found.group(1))


def test_our_plugin_repairs_the_reload(tmp_path: Path) -> None:
    """Experts, and tied embeddings: each alone was off by more than 1."""
    tied = {"tie_word_embeddings": True}
    a, b = (make_tiny_model(tmp_path / str(seed), seed=seed, hidden=128, changes=tied) for seed in (0, 1))
    assert reload_error(a, b, plugins="megarl") <= 1e-4


def test_vllm_alone_reloads_wrongly(checkpoints: tuple[Path, Path]) -> None:
    """Where this fails, vLLM has mended it and the patch may go."""
    assert reload_error(*checkpoints, plugins="") > 1e-2


def test_every_head_is_rotated() -> None:
    """Where vLLM alone is right, the patch may go."""
    alone, ours = figures_of("tests.engine.rotated_heads", r"^alone=(\S+) ours=(\S+)$")
    assert alone > 1e-2 and ours == 0


def test_c_norms_are_the_models() -> None:
    (error,) = figures_of("tests.engine.norms", r"^error=(\S+)$")
    assert error < 1e-6


def test_an_idle_engine_begins_a_batch_together() -> None:
    """Before, it began with the first one or two; one that is at work takes what is there and goes on."""
    batch, slow, busy = figures_of("tests.engine.together", r"^batch=(\d+) slow=(\d+) busy=(\d+)$")
    assert batch == slow == REQUESTS and busy < REQUESTS


def test_seeds_drawn_ahead_sample_the_same() -> None:
    same, calls = figures_of("tests.engine.seeds", r"^same=(\d) calls=(\d+)$")
    assert same == 1 and calls < 10


def test_log_probabilities_noted_at_once_are_the_same() -> None:
    same, positions = figures_of("tests.engine.noted_logprobs", r"^same=(\d) positions=(\d+)$")
    assert same == 1 and positions == 9


def figures_of(module: str, printed: str) -> list[float]:
    """What a script prints that has a vLLM process of its own, with our plugin."""
    environment = {
        **os.environ,
        "VLLM_PLUGINS": "megarl",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    found = re.search(printed, done.stdout, re.MULTILINE)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return [float(figure) for figure in found.groups()]
