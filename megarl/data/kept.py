"""The prompts of a file in about the memory of their tokens and texts: a Prompt is made when it is asked for."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload


@dataclass
class Prompt:
    """tokens: what the model is given; text: the tokens before tokenization; line: 1-based number in the
    file; row: all of the row, for rewards that ask for it. has_answer: false where none was needed and found.
    """

    tokens: list[int]
    answer: str
    text: str
    line: int
    row: dict[str, Any] = field(default_factory=dict, repr=False)
    has_answer: bool = True


class _MadeWhenAsked(Sequence[Prompt]):
    @overload
    def __getitem__(self, at: int) -> Prompt: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, at: int | slice) -> Prompt | Sequence[Prompt]:
        places = range(len(self))[at]
        return self._make(places) if isinstance(places, int) else Picked(self, places)

    def _make(self, at: int) -> Prompt:
        raise NotImplementedError


class Picked(_MadeWhenAsked):
    """Those of `prompts` at `places`, none of them made before it is asked for."""

    def __init__(self, prompts: Sequence[Prompt], places: Sequence[int]) -> None:
        self._prompts, self._places = prompts, places

    def __len__(self) -> int:
        return len(self._places)

    def _make(self, at: int) -> Prompt:
        return self._prompts[self._places[at]]


class KeptPrompts(_MadeWhenAsked):
    """Each is made anew when it is asked for. keeps: else they are only counted, for ranks that ask no server."""

    def __init__(self, *, keeps: bool = True) -> None:
        self._keeps, self._count = keeps, 0
        self._tokens, self._token_ends = array("i"), array("q", [0])
        self._rest, self._rest_ends = bytearray(), array("q", [0])  # pickles of what is no token, one after the other
        self._as_they_are: dict[int, Prompt] = {}  # by place

    def append(self, prompt: Prompt, said: Sequence[Any] = ()) -> None:
        """said: texts of its row that stand in its text, in this order, and so are kept once."""
        self._count += 1
        if not self._keeps:
            return
        text = _around(prompt.text, said)
        try:
            rest = pickle.dumps((text, prompt.answer, prompt.line, prompt.row, prompt.has_answer), -1)
        except Exception:  # an object of the row, as a dataset's audio, or lists hundreds deep
            self._as_they_are[self._count - 1] = prompt
        else:
            self._tokens.extend(prompt.tokens)
            self._rest += rest
        self._token_ends.append(len(self._tokens))
        self._rest_ends.append(len(self._rest))

    def __len__(self) -> int:
        return self._count

    def _make(self, at: int) -> Prompt:
        assert self._keeps, "a rank that asks no server keeps no prompts"
        if at in self._as_they_are:
            return self._as_they_are[at]
        tokens = self._tokens[self._token_ends[at] : self._token_ends[at + 1]].tolist()
        rest = memoryview(self._rest)[self._rest_ends[at] : self._rest_ends[at + 1]]
        text, answer, line, row, has_answer = pickle.loads(rest)
        return Prompt(tokens, answer, "".join(text), line, row, has_answer)


def _around(text: str, said: Sequence[Any]) -> list[str]:
    """The parts of `text`. Those of `said` are the same objects, of which a pickle holds one."""
    parts = []
    for piece in said:
        if isinstance(piece, str) and piece and piece in text:
            before, _, text = text.partition(piece)
            parts += [before, piece]
    return [*parts, text]
