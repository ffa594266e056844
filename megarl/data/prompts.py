"""JSONL in, token ids out. Every bad line is named by file and number."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megarl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

OnBadLine = Literal["error", "skip"]
PROMPT_ROW = '{"messages" | "prompt", "answer"}'
DEMONSTRATION_ROW = '{"messages" | "prompt", "response"}'
ROLES = ("system", "user", "assistant", "tool")


@dataclass
class Prompt:
    """tokens: what the model is given; text: the same before tokenization; line: 1-based number in the file."""

    tokens: list[int]
    answer: str
    text: str
    line: int


class BadLine(Exception):
    """What is wrong with a row and how to mend it; the file and the line are added where it is caught."""


def load_prompts(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, on_bad_line: OnBadLine
) -> tuple[list[Prompt], int]:
    """(prompts, number of bad lines) from rows {"messages": [...]} or
    {"prompt": text}, with "answer": text or a number.

    With a chat template both forms go through it, "prompt" as one user message, and the turn of the assistant is
    opened; without one,
    "prompt" is encoded as it is. Blank lines are no rows. A prompt of more than `max_tokens` tokens is a bad line.
    Raises UserError, one line, for a missing or empty file, and for the first bad line if `on_bad_line` is "error".
    """
    prompts: list[Prompt] = []
    bad = 0
    for line, raw in _lines(path, PROMPT_ROW):
        try:
            row = _parse(raw, PROMPT_ROW)
            tokens, text = _encode_prompt(row, tokenizer, max_tokens)
            prompts.append(Prompt(tokens, _answer(row), text, line))
        except BadLine as error:
            bad += _bad_line(path, line, error, on_bad_line)
    _refuse_nothing(path, len(prompts), bad)
    return prompts, bad


def load_demonstrations(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int, on_bad_line: OnBadLine
) -> list[tuple[list[int], int]]:
    """(prompt + response + eos, length of the prompt) from rows {"messages" | "prompt", "response": text}.

    `max_tokens` bounds the whole; otherwise as load_prompts. Skipped lines are counted in one log line.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no eos token, so a response could not end; set eos_token in tokenizer_config.json"
        )
    demonstrations: list[tuple[list[int], int]] = []
    bad = 0
    for line, raw in _lines(path, DEMONSTRATION_ROW):
        try:
            row = _parse(raw, DEMONSTRATION_ROW)
            tokens, _ = _encode_prompt(row, tokenizer, max_tokens)
            response = [*tokenizer.encode(_response(row), add_special_tokens=False), tokenizer.eos_token_id]
            _check_length(len(tokens) + len(response), max_tokens)
            demonstrations.append((tokens + response, len(tokens)))
        except BadLine as error:
            bad += _bad_line(path, line, error, on_bad_line)
    _refuse_nothing(path, len(demonstrations), bad)
    if bad:
        log.warning("%s: skipped %d bad lines, kept %d", path, bad, len(demonstrations))
    return demonstrations


def check_lines(path: str | Path, kind: Literal["prompts", "demonstrations"]) -> None:
    """Raises UserError for the first line that is no row, judged
    without a tokenizer: what can be told before any process starts.
    """
    shape = PROMPT_ROW if kind == "prompts" else DEMONSTRATION_ROW
    for line, raw in _lines(path, shape):
        try:
            row = _parse(raw, shape)
            _source(row)
            if kind == "prompts":
                _answer(row)
            else:
                _response(row)
        except BadLine as error:
            _bad_line(path, line, error, "error")


def _lines(path: str | Path, shape: str) -> Iterator[tuple[int, bytes]]:
    """(1-based number, line) of every line that is not blank."""
    if not Path(path).is_file():
        raise UserError(f"data file {str(path)!r} does not exist; give a JSONL file of rows {shape}")
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                yield line, raw.rstrip(b"\r\n")


def _parse(raw: bytes, shape: str) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON ({error.msg} at column {error.colno}); write one row {shape} a line") from None
    if not isinstance(row, dict):
        raise BadLine(f"holds a {type(row).__name__}; write one row {shape} a line")
    return row


def _encode_prompt(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> tuple[list[int], str]:
    messages, prompt = _source(row)
    if tokenizer.chat_template:
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates are programs: they raise what they like about a row
            raise BadLine(
                f"the tokenizer's chat template refuses it ({' '.join(str(error).split())}); mend 'messages'"
            ) from None
        tokens = tokenizer.encode(text, add_special_tokens=False)
    elif row.get("messages") is not None:
        raise BadLine("has 'messages', but the tokenizer has no chat template; give 'prompt'")
    else:
        text, tokens = str(prompt), tokenizer.encode(prompt)
    _check_length(len(tokens), max_tokens)
    return tokens, text


def _source(row: dict[str, Any]) -> tuple[list[dict[str, str]], Any]:
    """(messages, prompt): a row's messages, or its prompt as one message of the user."""
    messages, prompt = row.get("messages"), row.get("prompt")
    if messages is not None:
        _check_messages(messages)
    elif isinstance(prompt, str) and prompt:
        messages = [{"role": "user", "content": prompt}]
    else:
        raise BadLine(f"key 'prompt' is {prompt!r}; give a text, or 'messages'")
    return messages, prompt


def _response(row: dict[str, Any]) -> str:
    if not isinstance(row.get("response"), str):
        raise BadLine(f"key 'response' is {row.get('response')!r}; give a text")
    return str(row["response"])


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadLine(f"key 'messages' is {messages!r}; give a list of {{'role', 'content'}}")
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise BadLine(f"message {message!r} is not {{'role': one of {', '.join(ROLES)}, 'content': text}}")


def _check_length(length: int, max_tokens: int) -> None:
    if length > max_tokens:
        raise BadLine(f"{length} tokens are more than {max_tokens}; shorten it or raise the limit")


def _answer(row: dict[str, Any]) -> str:
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise BadLine(f"key 'answer' is {answer!r}; give a text or a number")
    return str(answer)


def _bad_line(path: str | Path, line: int, error: BadLine, on_bad_line: OnBadLine) -> int:
    if on_bad_line == "error":
        raise UserError(f"{path} line {line}: {error}; or set data.on_bad_line=skip") from None
    return 1


def _refuse_nothing(path: str | Path, kept: int, bad: int) -> None:
    if not kept:
        raise UserError(f"data file {str(path)!r} holds no usable row ({bad} bad lines); give at least one")
