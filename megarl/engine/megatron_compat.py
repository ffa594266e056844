"""Which release of megatron-core megarl is written for, and what it replaces in it whatever the device.

What a CPU needs besides is in device.py; what is no replacement but a subclass lies where it is used (pipeline.py,
mla.py).
"""

from __future__ import annotations

import importlib
import importlib.metadata

MEGATRON_CORE = "0.16"  # the release whose internals megarl/engine/ answers for or replaces


def check_release() -> None:
    """RuntimeError on another release of megatron-core than the one whose internals megarl/engine/ replaces, in
    device.py, permutation.py and pipeline.py.
    """
    installed = importlib.metadata.version("megatron-core")
    if not installed.startswith(MEGATRON_CORE + "."):
        raise RuntimeError(
            f"megatron-core {installed}: megarl replaces parts of {MEGATRON_CORE}.x; pip install "
            f"'megatron-core=={MEGATRON_CORE}.1'"
        )


def replace_parts() -> None:
    """In this process, for every model built from here on: rows go to the experts and back by index."""
    from megarl.engine import grad_norm, permutation

    permutation.install()
    grad_norm.install()
    _answer_without_transformer_engine()


def _answer_without_transformer_engine() -> None:
    """Names that megatron-core lacks, or takes for present, where Transformer Engine is not installed: on a GPU too."""
    core = "megatron.core."
    have_te = importlib.import_module(core + "extensions.transformer_engine").__dict__["HAVE_TE"]

    # transformer/moe/moe_utils.py:1192: NameError in every MoE forward.
    importlib.import_module(core + "transformer.moe.moe_utils").__dict__.setdefault("te_general_gemm", None)

    # transformer/multi_latent_attention.py:56: its HAVE_TE is true, and TELinear a mock and no type.
    importlib.import_module(core + "transformer.multi_latent_attention").__dict__["HAVE_TE"] = have_te
