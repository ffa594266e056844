"""vLLM's CUDA build on a machine without a GPU: `bash tools/vllm_cuda.sh` runs these tests; elsewhere they are skipped.

vLLM takes its platform from the driver. Here it is given one, of an H100, before anything else of vLLM is imported;
nothing runs on a device.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.config import Config, load_config
from megarl.server import supervise
from tools.tiny_model import make_tiny_model

GIB = 2**30


def _cuda_build() -> bool:
    """Whether vllm is its CUDA build: the CPU one has a name of its own, and one built from source another version."""
    try:
        return "cpu" not in importlib.metadata.version("vllm") and torch.version.cuda is not None
    except importlib.metadata.PackageNotFoundError:
        return False


if not _cuda_build():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def hopper() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # and vllm takes Triton although no driver is there yet
    import vllm.platforms as platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    answers: dict[str, Any] = {
        "get_device_capability": DeviceCapability(9, 0),
        "get_device_name": "NVIDIA H100",
        "get_device_total_memory": 80 * GIB,
        "num_compute_units": 132,
        "device_count": 8,
    }
    methods = {name: classmethod(lambda cls, *_, value=value, **__: value) for name, value in answers.items()}
    platforms._current_platform = type("Hopper", (NonNvmlCudaPlatform,), methods)()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("vllm_cuda") / "model")


@pytest.fixture
def configured(model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's configuration of the server that our command line starts on a GPU."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(supervise, "gpu_bytes", lambda: 80 * GIB)

    def of(keys: list[str]) -> Any:
        config: Config = load_config(
            None,
            [
                f"model.path={model}",
                "data.prompts=none.jsonl",
                "rollout.max_new_tokens=128",
                "rollout.max_prompt_tokens=64",
                *keys,
            ],
        )
        words = supervise.server_command(config, "127.0.0.1", 1)
        assert words[1:3] == ["-m", supervise.api_server()]
        args = _arguments()(FlexibleArgumentParser()).parse_args(words[3:])
        return AsyncEngineArgs.from_cli_args(args).create_engine_config()

    return of


def _arguments() -> Any:
    """vLLM's own parser of a server's command line, which has moved twice."""
    for place in ("common", "launchers", "openai"):
        name = f"vllm.entrypoints.{place}.cli_args"
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name).make_arg_parser
    raise RuntimeError("vLLM's make_arg_parser is in none of the places known")
