r"""Whether a response's final expression equals the answer: by text first, then by math-verify.

The answer may be plain ("1/2"), LaTeX with dollars or without, an amount of money, GSM8K's "#### 72", a letter or a
word. In the response the last \boxed{...} alone counts; without one what follows ####, else what math-verify finds.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import threading
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from types import FrameType
from typing import Any

from megarl.reward.answers import after_hashes, last_boxed

CPU_LIMIT_S = 5.0  # of one comparison, by a signal: in threads other than the main one there is no limit
# No expression looks at a run of blanks or digits from each of its places: a response may be one long run.
_MONEY = re.compile(
    r"^([-−]?)\s*(?:(?:US|C|A|HK)?\\?\$|USD|EUR|GBP|[€£¥₹])\s*|(?:(?<!\s)\s+)?(?:\\?\$|USD|EUR|GBP|[€£¥₹])$"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\[!,;: ]|~|\s+")
_LETTER = re.compile(r"\(?([A-Z])\)?[.:]?")
_LAST_LETTER = re.compile(r"(?i:answer|option|choice)\b[^A-Za-z]*(?:is\b[^A-Za-z]*)?\b([A-Z])\b(?!')")
_FRACTION = re.compile(r"(?:(?<!\d)(\d{1,99})\s*|(?<!\d))([¼-¾⅐-⅞])")


def equal_answers(response: str, answer: str) -> bool:
    """Whether the response's final expression is the answer. What takes longer than CPU_LIMIT_S counts as wrong."""
    import math_verify  # noqa: F401 - not under the limit, which could leave a half of its modules

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limit, of the wall clock, is off
    try:
        with _cpu_limit(CPU_LIMIT_S):
            return _equal(response, answer)
    except _TooLong:
        return False


def _equal(response: str, answer: str) -> bool:
    gold, guess = gold_of(answer), last_boxed(response)
    if guess == "" or not gold:  # cut short, or nothing to be equal to
        return False
    if guess is None:
        guess = after_hashes(response)
    if guess is None:
        letters = _LAST_LETTER.findall(response) if _LETTER.fullmatch(gold) else []
        return letters[-1] == plain(gold) if letters else _verified(gold, response)
    guess = clean(guess)
    return plain(guess) == plain(gold) or _verified(gold, f"\\boxed{{{guess}}}")


def fault_of_gold(answer: str) -> str:
    """Why no response can ever equal this answer; "" where one can."""
    gold = gold_of(answer)
    if not re.search(r"[^\W_]|\\[A-Za-z]|[∞∅]", gold):
        return "holds nothing to compare with; give the final expression"
    depth = 0
    for token in re.findall(r"\\.|[{}]", gold, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token, 0)
        if depth < 0:
            break
    return "has braces that do not close; mend its LaTeX" if depth else ""


def gold_of(answer: str) -> str:
    r"""The final expression of an answer: of GSM8K's worked one, of one in \boxed, of LaTeX between dollars."""
    answer = answer.strip()
    if (marked := after_hashes(answer)) is not None:
        answer = marked
    elif (boxed := last_boxed(answer)) is not None:
        answer = boxed
    elif between := re.findall(r"(?<!\\)\$+([^$]+?)(?<!\\)\$+", answer):
        answer = ", ".join(between)
    return clean(answer)


def clean(expression: str) -> str:
    """Without what math-verify stumbles over: marks of money, thin spaces, characters that LaTeX has commands for."""
    if len(re.findall(r"(?<!\\)\$", expression)) > 1:  # of LaTeX, not of money
        expression = re.sub(r"(?<!\\)\$", "", expression)
    expression = re.sub(r"\\!|\{,\}", "", expression)
    expression = re.sub(r"(?<=\d)\\[,;: ](?=\d{3})", "", expression)
    expression = _MONEY.sub(lambda match: match.group(1) or "", expression.strip())
    expression = _FRACTION.sub(lambda match: _mixed(match.group(1), match.group(2)), expression)
    return expression.replace("−", "-").strip()


def plain(expression: str) -> str:
    r"""For a comparison as text: without \text{}, blanks (but between words) and a full stop, a choice without its
    brackets; case folded.
    """
    text = _SPACE.sub(" ", _TEXT.sub(r"\1", expression)).strip(" $.")
    letter = _LETTER.fullmatch(text)
    return letter.group(1) if letter else re.sub(r"(?<!\w) | (?!\w)", "", text).casefold()


def _mixed(whole: str | None, sign: str) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", sign).partition("\u2044")
    top = int(whole or 0) * int(denominator) + int(numerator)
    return f"\\frac{{{top}}}{{{denominator}}}"


class _TooLong(BaseException):
    """No Exception: math-verify and sympy catch those."""


def _verified(gold: str, text: str) -> bool:
    from math_verify import parse, verify

    guess = parse(text, parsing_timeout=None)
    return bool(guess) and bool(verify(_parsed(gold), guess, timeout_seconds=None))


@lru_cache(maxsize=1024)
def _parsed(gold: str) -> list[Any]:
    from math_verify import parse

    return parse(f"\\boxed{{{gold}}}", parsing_timeout=None)


@contextlib.contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raises _TooLong after that much processor time of this process: a busy machine makes no answer wrong."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, expired)
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
