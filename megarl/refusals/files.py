"""Refusals of what a configuration points at: the model's folder, data, reward, the run's folder and its store."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path
from typing import Literal

from megarl.checkpoints import hf_files
from megarl.refusals.case import Case


def model_path(case: Case) -> str | None:
    path = case.config.model.path
    if not path:
        return "model.path is empty; give a Hugging Face checkpoint folder, e.g. model.path=runs/tiny"
    if not (hf_files(path) / "config.json").is_file():
        return (
            f"model.path {path!r} has no config.json; give a Hugging Face checkpoint folder, or a run's "
            "checkpoints/step_N"
        )
    try:
        _ = case.hf
    except ValueError as error:
        return f"model.path {path!r}: config.json is not JSON ({error}); copy the checkpoint again"
    return None


def model_weights(case: Case) -> str | None:
    folder = Path(case.config.model.path)
    if hf_files(folder) != folder:
        return _megatron_weights(case, folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(
            {name for name in json.loads(index.read_text())["weight_map"].values() if not (folder / name).is_file()}
        )
        return (
            f"model.path {str(folder)!r} lacks {missing[0]}, which its index names; copy the checkpoint again"
            if missing
            else None
        )
    if not any(folder.glob("*.safetensors")):
        return f"model.path {str(folder)!r} has no *.safetensors; save the checkpoint with safe_serialization"
    return None


def _megatron_weights(case: Case, folder: Path) -> str | None:
    if not (folder / ".metadata").is_file():
        return f"model.path {str(folder)!r} is not a whole checkpoint, it has no .metadata; give another"
    if case.command in ("generate", "compare"):
        hint = f"python checkpoints_conversion/megatron_to_hf.py --megatron {folder} --out DIR"
        return (
            f"model.path {str(folder)!r} is a Megatron checkpoint, which {case.command} cannot give to vLLM; convert "
            f"it first: {hint}"
        )
    return None


def block_fp8(case: Case) -> str | None:
    if not case.hf.get("quantization_config"):
        return None
    path = case.config.model.path
    return (
        f"model.path {path!r} is quantised (quantization_config): vLLM would keep it so, but is sent bfloat16; "
        "convert it first: "
        f"python checkpoints_conversion/hf_to_megatron.py --hf {path} --out DIR, then model.path=DIR"
    )


def deepseek_router(case: Case) -> str | None:
    """The trainer knows no other router for this family; vLLM
    (deepseek_v2.py) takes another where config.json does not say which.
    """
    needed = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    missing = [f'"{key}": "{value}"' for key, value in needed.items() if key not in case.hf]
    if case.hf.get("model_type") != "deepseek_v3" or not missing:
        return None
    return (
        f"model.path {case.config.model.path!r}: vLLM would route otherwise than the trainer; add "
        f"{', '.join(missing)} to its config.json"
    )


def glm_head_dim(case: Case) -> str | None:
    """vLLM (glm4_moe.py) has no default for it, transformers and the trainer hidden_size / num_attention_heads."""
    if case.hf.get("model_type") != "glm4_moe" or "head_dim" in case.hf:
        return None
    size = case.hf["hidden_size"] // case.hf["num_attention_heads"]
    return f'model.path {case.config.model.path!r}: vLLM wants head_dim; add "head_dim": {size} to its config.json'


def tokenizer(case: Case) -> str | None:
    folder = hf_files(case.config.model.path)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    return f"model.path {str(folder)!r} has no tokenizer.json; save the tokenizer beside the weights"


def family(case: Case) -> str | None:
    from megarl.weights.map.weight_map import FAMILIES

    kind = case.hf.get("model_type", "?")
    if kind not in FAMILIES:
        return f"model.path: model_type {kind!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
    return None


def architecture(case: Case) -> str | None:
    _ = case.model  # raises UserError: what the family refuses, by name
    return None


def _file(key: str, path: str | None, what: str) -> str | None:
    if not path:
        return f"{key} is empty; give {what}, one JSON object a line"
    if not Path(path).is_file():
        return f"{key} {path!r} does not exist; give {what}, one JSON object a line"
    if Path(path).stat().st_size == 0:
        return f"{key} {path!r} is an empty file; give {what}, one JSON object a line"
    return None


def prompts(case: Case) -> str | None:
    path = case.config.data.prompts
    return _file("data.prompts", path, "a file of prompts") or _lines(case, path, "prompts")


def eval_prompts(case: Case) -> str | None:
    path = case.config.eval.prompts
    if path is None:
        return None
    return _file("eval.prompts", path, "a file of prompts, or leave it unset") or _lines(case, path, "prompts")


def demonstrations(case: Case) -> str | None:
    path = case.config.sft.data
    return _file("sft.data", path, "a file of demonstrations") or _lines(case, path, "demonstrations")


def _lines(case: Case, path: str, kind: Literal["prompts", "demonstrations"]) -> None:
    from megarl.data.prompts import check_lines

    if case.config.data.on_bad_line == "error":
        check_lines(path, kind)  # raises UserError, naming the line


def reward(case: Case) -> str | None:
    from megarl.reward import get_reward

    get_reward(case.config.data.reward)  # raises UserError, naming the reward
    return None


def loggers(case: Case) -> str | None:
    from megarl.observe.loggers import find_logger

    for name in case.config.run.loggers:
        find_logger(name)  # raises UserError, naming the logger
    return None


def run_dir(case: Case) -> str | None:
    path = Path(case.config.run.dir)
    if not case.config.run.dir:
        return "run.dir is empty; give a folder, e.g. run.dir=runs/first"
    there = next(p for p in [path, *path.absolute().parents] if p.exists())
    if not there.is_dir():
        return f"run.dir {str(path)!r}: {str(there)!r} is a file; give a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"run.dir {str(path)!r} cannot be written; change its permissions or give another folder"
    return None


def store(case: Case) -> str | None:
    store = case.config.launch.store
    host, colon, port = store.rpartition(":")
    if ":" in host:
        return f"launch.store {store!r} is an IPv6 address, which is not supported; give a host's name or IPv4 address"
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        return f"launch.store {store!r} is not host:port; e.g. launch.store=127.0.0.1:29600"
    if port == "0" and case.command in ("train", "rollout"):
        return (
            f"launch.store {store!r}: port 0 is for megarl run, which starts both sides; give both the same port, "
            f"e.g. {host}:29600"
        )
    if case.command == "rollout" or int(os.environ.get("RANK", "0")) != 0:
        return None  # joins a store that another process owns
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"launch.store {store!r}: the port is in use; give another, or port 0 to let megarl run pick one"
        return (
            f"launch.store {store!r}: cannot listen there ({os.strerror(error.errno or 0)}); give an address of this "
            "host"
        )
    return None
