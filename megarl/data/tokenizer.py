"""The tokenizer of a model.path."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.checkpoints import hf_files
from megarl.config import ModelConfig
from megarl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Raises UserError, one line, where the folder holds none, or only code for one without model.trust_remote_code."""
    from transformers import AutoTokenizer

    if sentence := code_alone(model):
        raise UserError(sentence)
    try:
        return AutoTokenizer.from_pretrained(
            hf_files(model.path), local_files_only=True, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # a library for each kind, or the folder's own code: they raise what they like
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"model.path {model.path!r} has no usable tokenizer ({reason}); put its tokenizer files there"
        ) from None


def code_alone(model: ModelConfig) -> str | None:
    """One line where the tokenizer is a program in the folder (Moonlight, Kimi) that the user did not allow."""
    folder = hf_files(model.path)
    named = (settings(folder).get("auto_map") or {}).get("AutoTokenizer")
    if not named or model.trust_remote_code or (folder / "tokenizer.json").is_file():
        return None
    classes = [name for name in (named if isinstance(named, list) else [named]) if name]
    return (
        f"model.path {model.path!r}: its tokenizer is a program in that folder, {', '.join(map(str, classes))} "
        "(auto_map in tokenizer_config.json); read it, then set model.trust_remote_code=true, or save a tokenizer.json"
    )


def settings(folder: Path) -> dict[str, Any]:
    """Of tokenizer_config.json; empty without that file. Raises UserError where it cannot be read."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{str(file)!r} is not a JSON object; copy the checkpoint again") from None


def quick_encoder(path: str) -> Callable[[str], list[int]] | None:
    """A text's tokens without special ones, by tokenizer.json alone: imports no transformers. None without that file.
    Raises UserError where it cannot be read.
    """
    tokenizer = _quick(path)
    return None if tokenizer is None else lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def highest_token(path: str) -> int | None:
    """The largest id of tokenizer.json, added tokens included; None without that file."""
    tokenizer = _quick(path)
    return None if tokenizer is None else max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _quick(path: str) -> Any:
    file = Path(hf_files(path)) / "tokenizer.json"
    return _read(file, file.stat().st_mtime_ns) if file.is_file() else None


@functools.lru_cache(maxsize=1)
def _read(file: Path, _: int) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{str(file)!r} cannot be read ({' '.join(str(error).split())[:160]}); copy it again") from None
