"""What megarl adds to vLLM: the entry point of the group
vllm.general_plugins, run once in every vLLM process on this machine.

In a vLLM process that is not ours it repairs two bugs of the CPU build
(vllm_patches.py) and offers a backend name; nothing else changes.
"""

from __future__ import annotations

import multiprocessing
import os

BACKEND = "megarl"
OWN_SERVER = "MEGARL_ROLLOUT"  # set in the environment of the servers that megarl starts
FORKS = "MEGARL_FORKS"  # beside it where the engine is one process with one thread: it may be forked


def register() -> None:
    """Called by vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

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


def vllm_version() -> str:
    """Imports vLLM: raises whatever the import of a broken build raises."""
    import vllm

    return vllm.__version__
