"""What megarl asks of megatron-core: its release, its process groups."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from megatron.core import parallel_state

from megarl.config import load_config
from megarl.engine import parallel
from megarl.engine.device import setup_device


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
    monkeypatch.setattr(parallel_state, "destroy_model_parallel", lambda: None)
    with pytest.raises(InterruptedError):
        parallel.init_parallel(load_config(None, ["parallel.tp=2"]).parallel, setup_device(), seed=0)
    assert (
        asked["expert_tensor_parallel_size"] == asked["expert_model_parallel_size"] == 1
        and asked["tensor_model_parallel_size"] == 2
    )


def test_another_release_of_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of it is replaced, on a CPU and on a GPU."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.0")
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with pytest.raises(
            RuntimeError,
            match="megatron-core 0.19.0: megarl replaces parts of 0.16.x; pip install 'megatron-core==0.16.1'",
        ):
            setup_device()
