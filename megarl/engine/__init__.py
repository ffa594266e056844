"""The training engine: the only folder that imports megatron."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def _without_wandb() -> Iterator[None]:
    """megarl's own logger imports it where it is asked for. megatron-core does wherever it is installed, for inference
    that is not used here: about a ninth of what a rank imports, and temporary folders that outlive a rank that is
    killed.
    """
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["wandb"]


with _without_wandb():
    import megatron.core  # noqa: F401
