"""The shapes in which people have their rows: which key holds the prompt, which the answer, which the response.

`data.columns` comes first; then the keys below, in their order. What was taken is told once a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megarl.data.rows import BadLine
from megarl.errors import UserError
from megarl.reward.answers import after_hashes, last_boxed

PROMPT_ROW = '{"messages" | "prompt", "answer"}'
DEMONSTRATION_ROW = '{"messages" | "prompt", "response"}'
ROLES = ("system", "developer", "user", "assistant", "tool")
PROMPT_KEYS = ("messages", "prompt", "question", "problem", "instruction", "input")
ANSWER_KEYS = ("answer", "label", "solution", "reward_model.ground_truth")
RESPONSE_KEYS = ("response", "completion", "output")
WHOLE_ANSWERS = {"question": "answer", "problem": "solution"}  # prompt's key -> the key that holds the worked answer

Column = Literal["prompt", "answer", "response", "tools"]
Columns = Mapping[Column, str]
Kind = Literal["prompts", "demonstrations"]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Question:
    """messages: the conversation that the model continues. text: the prompt where it is a plain text. tools: for the
    chat template. last: the assistant's turn that ended the row's messages, which is no part of `messages`. key: where
    the prompt stood.
    """

    messages: Messages
    text: str | None
    tools: list[Any] | None
    last: str | None
    key: str


class Unseen:
    """The named columns that no row of a file has had yet: typing errors, since other keys are read in their place."""

    def __init__(self, columns: Columns, kind: Kind, needs_answer: bool = True) -> None:
        given: Column = "response" if kind == "demonstrations" else "answer"
        read = {"prompt", given} - (set() if needs_answer else {"answer"})
        self._columns = {column: key for column, key in columns.items() if column in read}

    def look(self, row: dict[str, Any]) -> None:
        for column in [c for c, key in self._columns.items() if find(row, key, ...) is not ...]:
            del self._columns[column]

    def refuse(self, path: str | Path) -> None:
        """Raises UserError where one is left."""
        if self._columns:
            column, key = next(iter(self._columns.items()))
            raise UserError(
                f"data.columns names {key!r} for the {column}, which no row of {str(path)!r} has; correct it or leave "
                "it out"
            )


def question_of(row: dict[str, Any], columns: Columns) -> Question:
    """Raises BadLine where the row holds no prompt."""
    key, value = _first(row, columns.get("prompt"), PROMPT_KEYS)
    if key is None:
        raise BadLine(_nothing(row, "prompt", "'prompt' or 'messages'"))
    tools = _tools(row, columns)
    if isinstance(value, str) and value:
        if key == "instruction" and isinstance(row.get("input"), str) and row["input"]:
            value = f"{value}\n{row['input']}"
        return Question([{"role": "user", "content": value}], value, tools, None, key)
    if not isinstance(value, list) or not value:
        raise BadLine(f"key {key!r} is {value!r}; give a text, or messages [{{'role', 'content'}}]")
    _check_messages(key, value)
    last = (value[-1].get("content") or "") if value[-1]["role"] == "assistant" else None
    messages = value[:-1] if last is not None else value
    if not messages:
        raise BadLine(f"key {key!r} holds the assistant's turn alone; put the user's before it")
    return Question(messages, None, tools, last, key)


def answer_of(row: dict[str, Any], columns: Columns) -> tuple[str, str]:
    """(answer, how it was found). Raises BadLine where there is none."""
    key, value = _first(row, columns.get("answer"), ANSWER_KEYS)
    if key is None:
        raise BadLine(_nothing(row, "answer", "'answer'"))
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadLine(f"key {key!r} is {value!r}; give a text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadLine(f"key {key!r} is {value!r}; give a finite number")
    if isinstance(value, float) and value.is_integer():  # a column of integers of which one is missing
        value = int(value)
    text = str(value)
    if (marked := after_hashes(text)) is not None:
        return marked, f"{key!r} after ####"
    if key == "solution":
        boxed = last_boxed(text)
        if boxed:
            return boxed, f"{key!r} in \\boxed"
        if "\n" in text.strip():
            raise BadLine("key 'solution' has several lines and no \\boxed{...}; give the final answer as 'answer'")
    return text, repr(key)


def response_of(row: dict[str, Any], columns: Columns, question: Question) -> tuple[str, str]:
    """(what the assistant says, where it stood). Raises BadLine where there is nothing."""
    if question.last is not None and "response" not in columns:
        if not question.last:
            raise BadLine(f"the last turn of key {question.key!r} has no content; give a text")
        return question.last, f"the last turn of {question.key!r}"
    worked = WHOLE_ANSWERS.get(question.key)
    key, value = _first(row, columns.get("response"), (*RESPONSE_KEYS, *([worked] if worked else [])))
    if key is None:
        raise BadLine(_nothing(row, "response", "'response', or messages that end with the assistant's turn"))
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")  # a conversation's completion, as one message
    if not isinstance(value, str):
        raise BadLine(f"key {key!r} is {value!r}; give a text")
    return value, repr(key)


def find(row: dict[str, Any], dotted: str, missing: Any = None) -> Any:
    """row["a"]["b"] for "a.b"; `missing` where a part is. A key that has the dot itself comes first."""
    if dotted in row:
        return row[dotted]
    value: Any = row
    for part in dotted.split("."):
        value = value.get(part, missing) if isinstance(value, dict) else missing
    return value


def _first(row: dict[str, Any], chosen: str | None, known: tuple[str, ...]) -> tuple[str | None, Any]:
    for key in (*([chosen] if chosen else []), *known):
        value = find(row, key)
        if value is not None:
            return key, value
    return None, None


def _nothing(row: dict[str, Any], what: str, names: str) -> str:
    keys = ", ".join(map(repr, row)) or "none"
    return f"has no {what}, its keys are {keys}; give {names}, or name its column in data.columns ({what}: KEY)"


def _tools(row: dict[str, Any], columns: Columns) -> list[Any] | None:
    key = columns.get("tools", "tools")
    tools = find(row, key)
    if isinstance(tools, str):  # a column of JSON texts
        try:
            tools = json.loads(tools or "null")
        except ValueError:
            raise BadLine(f"key {key!r} is {tools[:80]!r}; give a list of tools") from None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadLine(f"key {key!r} is {tools!r}; give a list of tools")
    return tools


def _check_messages(key: str, messages: list[Any]) -> None:
    for number, message in enumerate(messages):
        where = f"message {number} of key {key!r}"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadLine(f"{where} is {message!r}; give {{'role': one of {', '.join(ROLES)}, 'content': text}}")
        content = message.get("content")
        if isinstance(content, str) or (content is None and message.get("tool_calls")):
            continue
        raise BadLine(f"{where} has the content {content!r}; give a text, the models here read nothing else")
