"""Refusals of what the rollout server, vLLM 0.32, would refuse only after it has started."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megarl.launch.gpus import has_gpu
from megarl.refusals.case import Case

CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # v1/attention/backends/cpu_attn.py
BLOCK = 32  # tokens of a block of the KV cache, as megarl/server/supervise.py asks for


def heads_on_a_cpu(case: Case) -> str | None:
    size = _head(case)
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
    if (size := _head(case)) % 32:
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
    if case.config.rollout.enforce_eager or has_gpu() or any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++"))):
        return None
    return (
        "rollout.enforce_eager false on a CPU needs a C++ compiler, this host has no g++; install one or set "
        "rollout.enforce_eager=true"
    )


def kv_cache(case: Case) -> str | None:
    """Where its size is ours to say, it holds one request of the longest kind, and the block that vLLM keeps empty."""
    config, rollout = case.config, case.config.rollout
    if has_gpu() and not config.launch.colocate:
        return None
    longest = config.server_context
    tokens = (-(-longest // BLOCK) + 1) * BLOCK
    needed = tokens * _bytes_per_token(case) / 2**30
    if rollout.kv_cache_gib >= needed:
        return None
    return (
        f"rollout.kv_cache_gib {rollout.kv_cache_gib:g} cannot hold one request of {longest} tokens "
        f"(rollout.max_prompt_tokens {rollout.max_prompt_tokens} + max_new_tokens {rollout.max_new_tokens}, or a "
        f"weight sync's check); raise it to {_two_digits_up(needed)} or more"
    )


def _head(case: Case) -> int:
    """Width of a head in vLLM's cache: of keys and values alike, on a CPU without MLA's compression."""
    if case.model.get("multi_latent_attention"):
        return case.model["qk_head_dim"] + case.model["qk_pos_emb_head_dim"]
    return case.model["kv_channels"]


def _bytes_per_token(case: Case) -> int:
    """Of one rank of a server, over all layers."""
    rollout, model = case.config.rollout, case.model
    dtype = rollout.dtype if rollout.dtype != "auto" else case.config.engine.dtype
    wide = dtype == "float32" or (dtype == "auto" and not has_gpu())
    element = 1 if rollout.kv_cache_dtype == "fp8" else 4 if wide else 2
    if model.get("multi_latent_attention") and has_gpu():
        width = model["kv_lora_rank"] + model["qk_pos_emb_head_dim"]
    else:
        width = 2 * max(1, model["num_query_groups"] // rollout.tp) * _head(case)
    return model["num_layers"] * width * element


def _two_digits_up(value: float) -> str:
    """The next larger number of two digits: 0.01232 -> 0.013."""
    step = 10.0 ** (int(f"{value:e}".partition("e")[2]) - 1)
    return f"{(int(value / step) + 1) * step:.2g}"
