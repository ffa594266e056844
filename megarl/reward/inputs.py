"""What a reward is told about one response, by the names of its own parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from megarl.errors import UserError
from megarl.reward.answers import after_thoughts

OFFERED = (
    "response",
    "final_response",
    "response_with_special_tokens",
    "answer",
    "prompt",
    "row",
    "tokens",
    "prompt_tokens",
    "truncated",
)
VERL = {"solution_str": "response", "ground_truth": "answer"}
OLDER = {"response_text": "response", "prompt_text": "prompt"}
WITHOUT_A_COLUMN: dict[str, Any] = {"data_source": "", "extra_info": {}}  # verl's names, where the row has no such key


@dataclass(frozen=True)
class RewardInput:
    """One response and what it answers.

    response: its text without special tokens and the token that ended it, but with the tags of data.thinking_tags.
    final_response: what follows the
    thoughts, "" where they never end. row: the prompt's row of the data file. tokens: ids of the response, the end
    included. truncated: whether rollout.max_new_tokens cut it. decode: tokens, special ones too, into text; only few
    rewards want it.
    """

    response: str
    answer: str
    prompt: str
    final_response: str | None = None  # None: the whole response
    _: KW_ONLY
    row: Mapping[str, Any] = field(default_factory=dict)
    tokens: Sequence[int] = ()
    prompt_tokens: Sequence[int] = ()
    truncated: bool = False
    decode: Callable[[Sequence[int]], str] | None = None

    @property
    def response_with_special_tokens(self) -> str:
        return self.decode(self.tokens) if self.decode else self.response

    def get(self, name: str) -> Any:
        """The value of a parameter of that name; KeyError where there is none. Ours come before columns of the row."""
        name = {**VERL, **OLDER}.get(name, name)
        if name in OFFERED:
            value = getattr(self, name)
            if value is None:
                return self.response
            return list(value) if name in ("tokens", "prompt_tokens") else value
        return self.row[name] if name in self.row else WITHOUT_A_COLUMN[name]


@dataclass(frozen=True)
class Wanted:
    """The parameters of a reward function. everything: it takes **kwargs."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    everything: bool = False

    def of(self, sample: RewardInput, reward: str) -> dict[str, Any]:
        """Arguments for a call. Raises UserError where a parameter without a default has no value."""
        names = [*self.required, *self.optional]
        if self.everything:
            names += [*OFFERED, *VERL, *WITHOUT_A_COLUMN, *sample.row]
        arguments: dict[str, Any] = {}
        for name in names:
            try:
                arguments[name] = sample.get(name)
            except KeyError:
                if name in self.required:
                    keys = ", ".join(map(str, sample.row)) or "none"
                    raise UserError(
                        f"data.reward {reward!r} has the parameter {name!r}, which is neither one of "
                        f"{', '.join((*OFFERED, *VERL))} nor a key of the row ({keys}); rename it or give it a default"
                    ) from None
        return arguments


def wanted_by(reward: str, function: Callable[..., Any]) -> Wanted:
    """Raises UserError, one line, for a function that cannot be called by the names of its parameters."""
    call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    if inspect.iscoroutinefunction(call):
        raise UserError(f"data.reward {reward!r} is an async function; give a plain one")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        raise UserError(f"data.reward {reward!r} has no signature to read; wrap it in a function of your own") from None
    kinds = {parameter.kind for parameter in parameters}
    if not parameters or kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
        shown = inspect.signature(function)
        raise UserError(
            f"data.reward {reward!r} has the parameters {shown}; rewards are called by name, give it some of "
            f"{', '.join(OFFERED)}"
        )
    named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return Wanted(
        tuple(p.name for p in named if p.default is inspect.Parameter.empty),
        tuple(p.name for p in named if p.default is not inspect.Parameter.empty),
        inspect.Parameter.VAR_KEYWORD in kinds,
    )


class Texts:
    """Tokens into a RewardInput: what is a special token, and what a tag that rewards see all the same."""

    def __init__(self, tokenizer: Any, thinking_tags: Sequence[str], ends: Sequence[int] = ()) -> None:
        """ends: tokens that end a response."""
        self.tokenizer, self.tags, self.ends = tokenizer, tuple(thinking_tags), frozenset(ends)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        vocabulary = tokenizer.get_vocab()  # convert_tokens_to_ids gives the unknown token for a tag that is none
        shown = {vocabulary[tag] for tag in self.tags if tag in vocabulary}
        self._hidden = special - shown if special & shown else None

    def input(
        self, tokens: Sequence[int], prompt_len: int, prompt: str, answer: str, row: Mapping[str, Any], truncated: bool
    ) -> RewardInput:
        """tokens: prompt and response."""
        prompt_tokens, ids = tokens[:prompt_len], tokens[prompt_len:]
        said = ids[:-1] if ids and not truncated and ids[-1] in self.ends else ids
        if self._hidden is None:
            text = self.tokenizer.decode(said, skip_special_tokens=True)
        else:
            text = self.tokenizer.decode([i for i in said if i not in self._hidden])
        return RewardInput(
            response=text,
            answer=answer,
            prompt=prompt,
            final_response=after_thoughts(text, prompt, self.tags),
            row=row,
            tokens=ids,
            prompt_tokens=prompt_tokens,
            truncated=truncated,
            decode=self.tokenizer.decode,
        )
