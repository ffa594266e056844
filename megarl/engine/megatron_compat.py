"""Every difference between releases of megatron-core, by what a release can do, and what megarl replaces in it whatever
the device.

A release that no test has seen is warned of once, in one line; only one that lacks a name in NEEDED is refused. What a
CPU needs besides is in device.py; what is no replacement but a subclass lies where it is used (pipeline.py, mla.py).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import os
import sys
from typing import Any

import torch

TESTED = ("0.16", "0.19")  # the releases that tests run on; docs/engines.md says which tests
CORE = "megatron.core."
NEEDED = {  # names that are no part of megatron-core's interface: module -> what device.py and its neighbours use of it
    "dist_checkpointing.strategies.filesystem_async": "FileSystemWriterAsync.write_preloaded_data",
    "dist_checkpointing.strategies.torch": "TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks",
    "optimizer.cpu_offloading.hybrid_optimizer": "HybridDeviceOptimizer._init_sub_optimizers"
    " HybridDeviceOptimizer._get_sub_optimizer_param_groups HybridDeviceOptimizer._sync_hdo_state_to_sub_optimizers"
    " HybridDeviceOptimizer._sync_sub_optimizers_state_to_hdo",
    "optimizer.distrib_optimizer": "DistributedOptimizer.sharded_param_state_fully_reshardable"
    " DistributedOptimizer.load_parameter_state_from_fully_reshardable USING_TE_OPTIMIZER HAVE_APEX_OR_TE",
    "pipeline_parallel.p2p_communication": "P2PCommunicator._communicate_shapes",
    "pipeline_parallel.schedules": "get_schedule_table",
    "tensor_parallel.random": "_get_cuda_rng_state _set_cuda_rng_state",
    "transformer.moe.router": "topk_routing_with_score_function TopKRouter",
    "transformer.moe.token_dispatcher": "permute unpermute sort_chunks_by_idxs maybe_move_tensor_to_cpu",
}


def check_release() -> None:
    """RuntimeError where a name that megarl needs is missing. A warning where nobody has tried the release."""
    installed = importlib.metadata.version("megatron-core")
    missing = [
        f"{module}.{name}" for module, names in NEEDED.items() for name in names.split() if not _has(module, name)
    ]
    known, either = (word.join(f"{release}.x" for release in TESTED) for word in (" and ", " or "))
    if missing:
        raise RuntimeError(
            f"megatron-core {installed} lacks {', '.join(missing)}, which megarl needs; install {either}"
        )
    if not installed.startswith(tuple(f"{release}." for release in TESTED)) and os.environ.get("RANK", "0") == "0":
        _say_once(
            f"megarl: warning: megatron-core {installed}: megarl is tested with {known}; unverified are the equality "
            "of layouts, exact resume and routing replay (tests/unit and tests/parallel verify them)"
        )


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _has(module: str, name: str) -> bool:
    try:
        found: Any = importlib.import_module(CORE + module)
    except ModuleNotFoundError:
        return False
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None


def replace_parts() -> None:
    """In this process, for every model built from here on: rows go to the experts and back by index, and experts are
    chosen in the order of their scores.
    """
    from megarl.engine import grad_norm, permutation

    permutation.install()
    grad_norm.install()
    _answer_without_transformer_engine()
    _sort_experts()


def _answer_without_transformer_engine() -> None:
    """Names that megatron-core lacks, or takes for present, where Transformer Engine is not installed, on a GPU too;
    and what it hands to Transformer Engine wherever that is installed.
    """
    have_te = importlib.import_module(CORE + "extensions.transformer_engine").__dict__["HAVE_TE"]

    # transformer/moe/moe_utils.py:1192: NameError in every MoE forward without it. With it the router's float32
    # products are TF32, and need a GPU.
    importlib.import_module(CORE + "transformer.moe.moe_utils").__dict__["te_general_gemm"] = None

    # transformer/multi_latent_attention.py:56: its HAVE_TE is true, and TELinear a mock and no type.
    importlib.import_module(CORE + "transformer.multi_latent_attention").__dict__["HAVE_TE"] = have_te


def _sort_experts() -> None:
    """The experts of a token in the order of their scores in every pass.

    megatron-core 0.19 sorts them only where gradients are on (moe_utils.py, _compute_topk). The gates are normalised by
    a sum in that order, so those of pi_old, of a score and of recompute's first forward would differ from the update's
    in the last bit. Scores made without gradients stay without them here: nothing is recorded.
    """
    router = importlib.import_module(CORE + "transformer.moe.router")
    original = router.topk_routing_with_score_function
    if hasattr(original, "sorts_experts"):
        return

    @functools.wraps(original)
    def choose(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return original(*args, **kwargs)

    choose.sorts_experts = True  # type: ignore[attr-defined]
    router.__dict__["topk_routing_with_score_function"] = choose


@functools.cache
def _permute_counts() -> bool:
    from megatron.core.transformer.moe import moe_utils

    return "tokens_per_expert" in inspect.signature(moe_utils.permute).parameters


def permuted(rows: Any, probs: Any, index: Any, tokens_per_expert: Any = None) -> tuple[Any, ...]:
    """What this release's permute returns: three values, or five, the last of them padding and counts."""
    return (rows, probs, index, None, tokens_per_expert) if _permute_counts() else (rows, probs, index)


@functools.cache
def pairs_of_latent_rotation() -> dict[str, bool]:
    """Arguments of apply_rotary_pos_emb with which latent attention rotates neighbours, as its models do. Releases
    before 0.19 take it from the configuration; without the argument 0.19 rotates halves, in silence.
    """
    from megatron.core.models.common.embeddings import apply_rotary_pos_emb

    name = "mla_rotary_interleaved"
    return {name: True} if name in inspect.signature(apply_rotary_pos_emb).parameters else {}


def submodules_of(spec: Any) -> Any:
    """Of a ModuleSpec, or of a partial, which newer releases have in its place."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def with_module(spec: Any, module: type) -> Any:
    """The same spec, or partial, for another class. A spec is changed in place."""
    if isinstance(spec, functools.partial):
        return functools.partial(module, *spec.args, **spec.keywords)
    spec.module = module
    return spec


def groups_of_layout() -> list[Any]:
    """The process groups that megatron-core has made for this rank and knows; none where a release keeps no list."""
    known = getattr(importlib.import_module(CORE + "parallel_state"), "_global_process_group_list", None)
    return [group for group in known or () if group is not None]


def own_asynchronous_save() -> dict[str, str]:
    """Arguments of dist_checkpointing.save that keep it to megatron-core's own writer where there is a choice."""
    from megatron.core import dist_checkpointing

    chooses = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if chooses else {}
