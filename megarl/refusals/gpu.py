"""Refusals of what only a GPU, or a package that is not installed, can do."""

from __future__ import annotations

import importlib.util
import os

from megarl.launch.gpus import has_gpu
from megarl.refusals.case import Case


def transformer_engine(case: Case) -> str | None:
    if case.config.engine.transformer_impl != "transformer_engine":
        return None
    if importlib.util.find_spec("transformer_engine") is None:
        return (
            "engine.transformer_impl transformer_engine: it is not installed; install the gpu extra or set "
            "engine.transformer_impl=auto"
        )
    if not has_gpu():
        return (
            "engine.transformer_impl transformer_engine needs a GPU, this host has none; set "
            "engine.transformer_impl=auto"
        )
    if case.config.engine.dtype == "float32":
        return (
            "engine.transformer_impl transformer_engine with engine.dtype float32: its float32 products are TF32, of "
            "10 bits; set engine.transformer_impl=auto"
        )
    if case.model.get("multi_latent_attention"):
        return (
            "engine.transformer_impl transformer_engine has no latent attention over packed rows; set "
            "engine.transformer_impl=auto"
        )
    return None


def colocate(case: Case) -> str | None:
    launch, rollout = case.config.launch, case.config.rollout
    if not launch.colocate:
        return None
    if case.command != "run":
        return (
            f"launch.colocate true is for megarl run, which places both sides on one node, not megarl {case.command}; "
            "set it to false"
        )
    if not has_gpu():
        return "launch.colocate true needs a GPU, this host has none; set launch.colocate=false"
    workers = rollout.engines * rollout.tp
    if workers != case.world:
        return (
            "launch.colocate true puts one rollout worker beside each trainer rank: rollout engines "
            f"{rollout.engines} x tp {rollout.tp} "
            f"is not launch.trainers {case.world}; set rollout.engines={max(1, case.world // rollout.tp)} or "
            f"launch.trainers={workers}"
        )
    if case.config.sync.staged:
        return (
            "launch.colocate true with sync.staged true keeps a second copy of the weights on the GPU; leave "
            "sync.staged unset"
        )
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):  # torch reads both
        if "expandable_segments:true" in os.environ.get(name, "").lower():
            return f"launch.colocate true: memory of {name} expandable_segments:True cannot be shared; unset it"
    return None


def rollout_kernels(case: Case) -> str | None:
    rollout = case.config.rollout
    if rollout.quantization != "none" and not has_gpu():
        return (
            f"rollout.quantization {rollout.quantization} needs a GPU, this host has none; set "
            "rollout.quantization=none"
        )
    if rollout.batch_invariant and not has_gpu():
        return "rollout.batch_invariant true needs a GPU, this host has none; set rollout.batch_invariant=false"
    if rollout.batch_invariant and rollout.kv_cache_dtype == "fp8":
        return (
            "rollout.batch_invariant true with rollout.kv_cache_dtype fp8 is not offered by vLLM; set "
            "rollout.kv_cache_dtype=auto"
        )
    return None


def rollout_python(case: Case) -> str | None:
    path = case.config.launch.rollout_python
    if path is not None and not os.access(path, os.X_OK):
        return (
            f"launch.rollout_python {path!r} is no program; give the Python of the environment that holds vLLM, or "
            "leave it unset"
        )
    return None


def loader(case: Case) -> str | None:
    if case.config.data.loader == "dali" and not _has_dali():
        return "data.loader dali: nvidia-dali is not installed; install the dali extra or set data.loader=torch"
    return None


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ImportError:  # there is no package nvidia at all
        return False
