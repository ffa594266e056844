"""What megarl adds to vLLM: the entry point of the group vllm.general_plugins, run once in every vLLM process on this machine.

In a vLLM process that is not ours it repairs one bug (weights updated in place on a CPU) and offers a backend name; nothing else changes.
"""

from __future__ import annotations

BACKEND = "megarl"


def register() -> None:
    """Called by vLLM. Raises RuntimeError in our own servers when vLLM is another version than the patches were written for."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "megarl.rollout.receiver", "WeightReceiver")
    if current_platform.is_cpu():
        from megarl.rollout import vllm_patches

        vllm_patches.apply()
