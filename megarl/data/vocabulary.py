"""What a model's folder says about token ids: how many there are, and which of them end a response.

Three files may name ends, and they often differ: generation_config.json has a list in GLM-4.5 and Qwen, config.json
one in older checkpoints, the tokenizer has one. All count. Rollouts stop at any of them, a demonstration ends with one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.checkpoints import hf_files
from megarl.config import Config
from megarl.errors import UserError
from megarl.weights.map.weight_map import load_hf_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "megarl-answer"  # stands for the assistant's text in a template


@dataclass(frozen=True)
class Vocabulary:
    """size: token ids lie below it. ends: what ends a response; the first is what a demonstration ends with."""

    size: int
    ends: tuple[int, ...]


def vocabulary_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Raises UserError where no token ends a response."""
    size = load_hf_config(config.model.path)["vocab_size"]
    return Vocabulary(size, tuple(end_tokens(config, tokenizer, size)))


def end_tokens(config: Config, tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """The tokenizer's eos, the folder's and rollout.stop_token_ids, below `size`, each once. The first is the token by
    which the chat template ends the assistant's turn, if it is one of them.
    """
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    declared = [*eos, *declared_ends(config.model.path), *config.rollout.stop_token_ids]
    ends = list(dict.fromkeys(token for token in declared if 0 <= token < size))
    if not ends:
        beyond = f" ({', '.join(map(str, declared))} are not below vocab_size {size})" if declared else ""
        raise UserError(
            f"model.path {config.model.path!r}: neither its tokenizer nor generation_config.json nor config.json names "
            f"an eos token{beyond}, so no response would end; give rollout.stop_token_ids=[ID]"
        )
    turn = _turn_end(tokenizer)
    return [turn, *(token for token in ends if token != turn)] if turn is not None and turn in ends else ends


def declared_ends(path: str) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json, as transformers has it."""
    for name in ("generation_config.json", "config.json"):
        file = Path(hf_files(path)) / name
        if file.is_file() and (named := _eos_of(file)):
            return named
    return []


def _eos_of(file: Path) -> list[int]:
    try:
        tree: Any = json.loads(file.read_text(encoding="utf-8"))
        named = tree.get("eos_token_id")
    except (ValueError, AttributeError):
        raise UserError(f"{str(file)!r} is not a JSON object; copy the checkpoint again") from None
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(token) is int for token in ids):
        raise UserError(f"{str(file)!r}: eos_token_id {named!r} is neither a token id nor a list of them; mend it")
    return ids


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first token behind the assistant's text where another turn follows: what a model learns to say at the end."""
    if not tokenizer.chat_template:
        return None
    user = {"role": "user", "content": "1"}
    try:
        text = tokenizer.apply_chat_template(
            [user, {"role": "assistant", "content": ANSWER}, user], tokenize=False, add_generation_prompt=False
        )
    except Exception:  # a template that wants other turns says nothing about its ends
        return None
    behind = str(text).rpartition(ANSWER)[2].lstrip()
    tokens = tokenizer.encode(behind, add_special_tokens=False) if behind else []
    return tokens[0] if tokens else None
