"""The tokenizer of a model.path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
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


def has_chat_template(path: str) -> bool:
    """Whether the folder holds one, as far as its files tell without transformers."""
    folder = hf_files(path)
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))


def token_counter(path: str) -> Callable[[str], int] | None:
    """Tokens of a text without special ones, by tokenizer.json alone: imports no transformers. None without that file,
    or where it cannot be read, which load_tokenizer tells.
    """
    from tokenizers import Tokenizer

    file = Path(hf_files(path)) / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the library raises bare Exception
        return None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
