"""Refusals of what the rollout server, vLLM 0.32, would refuse only after it has started."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megarl.launch import kv_cache as kv
from megarl.launch.gpus import gpu_bytes, has_gpu
from megarl.refusals.case import Case

CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # v1/attention/backends/cpu_attn.py


def heads_on_a_cpu(case: Case) -> str | None:
    size = kv.head_width(case.model)
    if has_gpu() or size in CPU_HEADS:
        return None
    name = "qk_nope_head_dim + qk_rope_head_dim" if case.model.get("multi_latent_attention") else "head_dim"
    return (
        f"model.path {case.config.model.path!r}: {name} {size} is none that vLLM's attention on a CPU has "
        f"({', '.join(map(str, CPU_HEADS))}); use another model, or a GPU"
    )


def fp8_cache_on_a_cpu(case: Case) -> str | None:
    """What its cpu_attn.py asks for."""
    if case.config.rollout.kv_cache_dtype != "fp8" or has_gpu():
        return None
    if (size := kv.head_width(case.model)) % 32:
        return (
            f"rollout.kv_cache_dtype fp8 on a CPU needs heads of a multiple of 32, these are {size}; set "
            "rollout.kv_cache_dtype=auto"
        )
    if "avx512f" not in _cpu_flags():
        return "rollout.kv_cache_dtype fp8 on a CPU needs AVX-512, this one has none; set rollout.kv_cache_dtype=auto"
    return None


def _cpu_flags() -> set[str]:
    return set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())


def compiler_on_a_cpu(case: Case) -> str | None:
    """torch.compile writes C++ there (torch/_inductor/cpp_builder.py)."""
    eager = case.config.rollout.enforce_eager is not False
    if eager or has_gpu() or any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++"))):
        return None
    return (
        "rollout.enforce_eager false on a CPU needs a C++ compiler, this host has no g++; install one or set "
        "rollout.enforce_eager=true"
    )


def kv_cache(case: Case) -> str | None:
    """Where its size is ours to say, it holds one request of the longest kind."""
    config, rollout = case.config, case.config.rollout
    if (gpu := has_gpu()) and not config.launch.colocate:
        return None
    longest, needed = config.server_context, kv.request_bytes(config, case.model, gpu) / 2**30
    what = (
        f"one request of {longest} tokens (rollout.max_prompt_tokens {rollout.max_prompt_tokens} + max_new_tokens "
        f"{rollout.max_new_tokens}, or a weight sync's check)"
    )
    if gpu and rollout.kv_cache_gib is None:
        size = gpu_bytes()
        left = kv.colocated_bytes(config, case.weight_map, size) / 2**30
        return (
            f"launch.colocate true: {rollout.gpu_memory_utilization:g} (rollout.gpu_memory_utilization) of a GPU of "
            f"{size / 2**30:.0f} GiB leaves {max(left, 0):.2g} GiB beside the weights of trainer and rollouts, "
            f"{_two_digits_up(needed)} hold {what}; raise rollout.tp or parallel.*, or set it to false"
            if left < needed
            else None
        )
    given = kv.ON_A_CPU_GIB if rollout.kv_cache_gib is None else rollout.kv_cache_gib
    if given >= needed:
        return None
    return f"rollout.kv_cache_gib {given:g} cannot hold {what}; raise it to {_two_digits_up(needed)} or more"


def _two_digits_up(value: float) -> str:
    """The next larger number of two digits: 0.01232 -> 0.013."""
    step = 10.0 ** (int(f"{value:e}".partition("e")[2]) - 1)
    return f"{(int(value / step) + 1) * step:.2g}"
