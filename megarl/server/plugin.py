"""What megarl adds to vLLM: the entry point of the group
vllm.general_plugins, run once in every vLLM process on this machine.

A vLLM that lacks a name that megarl needs (vllm_release.py) is refused in our servers. In a vLLM process that is not
ours it is left alone; any other is repaired on a CPU (vllm_patches.py) and offers a backend name; nothing else changes.
"""

from __future__ import annotations

import multiprocessing
import os

BACKEND = "megarl"
OWN_SERVER = "MEGARL_ROLLOUT"  # set in the environment of the servers that megarl starts
FORKS = "MEGARL_FORKS"  # beside it where the engine is one process with one thread: it may be forked


def register() -> None:
    """Called by vLLM. RuntimeError names what this vLLM lacks."""
    from vllm.platforms import current_platform

    from megarl.server.vllm_release import missing_names, refuse_missing_names

    if OWN_SERVER in os.environ:
        refuse_missing_names(current_platform.is_cpu())
    elif missing_names(current_platform.is_cpu()):
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "megarl.server.weight_receiver", "WeightReceiver")
    if current_platform.is_cpu():
        from megarl.server import vllm_patches

        vllm_patches.apply()
    end_with_parent()


def end_with_parent() -> None:
    """Of a process below one of our servers: vLLM's engine outlives an API server that is killed."""
    if OWN_SERVER in os.environ and (parent := multiprocessing.parent_process()) is not None:
        from megarl.launch.lifeline import die_with_parent

        assert parent.pid is not None
        die_with_parent(parent.pid)
