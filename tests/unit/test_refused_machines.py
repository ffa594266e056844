"""Refusals that depend on the machine and on who starts a command: packages, processor, ports, folders, world size."""

from __future__ import annotations

import json
import os
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from megarl import refusals
from megarl.config import load_config
from megarl.errors import UserError


def test_a_loader_that_is_not_installed(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(run_yaml, ["data.loader=dali"])
    refusals.check(config, "sft")
    monkeypatch.setattr(refusals.gpu, "_has_dali", lambda: False)
    with pytest.raises(
        UserError, match="nvidia-dali is not installed; install the dali extra or set data.loader=torch"
    ):
        refusals.check(config, "sft")


@pytest.mark.parametrize(("flags", "refused"), [({"avx2"}, True), ({"avx2", "avx512f"}, False)])
def test_an_fp8_cache_needs_avx512_on_a_cpu(
    run_yaml: Path, hf_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, flags: set[str], refused: bool
) -> None:
    (run_yaml.parent / "model" / "config.json").write_text(json.dumps(hf_config | {"head_dim": 32}))
    monkeypatch.setattr(refusals.server, "_cpu_flags", lambda: flags)
    with (
        pytest.raises(UserError, match="needs AVX-512, this one has none; set rollout.kv_cache_dtype=auto")
        if refused
        else nullcontext()
    ):
        refusals.check(load_config(run_yaml, ["rollout.kv_cache_dtype=fp8"]))


def test_a_port_in_use(run_yaml: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = load_config(run_yaml, [f"launch.store=127.0.0.1:{other.getsockname()[1]}"])
        with pytest.raises(UserError, match="the port is in use; give another"):
            refusals.check(config)
        refusals.check(config, "rollout")  # joins that store


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_run_dir_that_cannot_be_written(run_yaml: Path) -> None:
    run_yaml.parent.joinpath("locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="nothing can be written to .*/locked'"):
        refusals.check(load_config(run_yaml, [f"run.dir={run_yaml.parent}/locked/run"]))


def test_the_world_of_an_outer_torchrun_counts(run_yaml: Path) -> None:
    with pytest.raises(UserError, match="there are 2"):
        refusals.check(load_config(run_yaml), "train", world_size=2)
