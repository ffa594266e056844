"""The tokenizer of a model.path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megarl.checkpoints import hf_files
from megarl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Raises UserError, one line, where the folder holds none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(hf_files(path), local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"model.path {path!r} has no usable tokenizer ({reason}); put its tokenizer files there"
        ) from None
