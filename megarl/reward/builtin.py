"""The rewards that come with megarl: each 1.0 or 0.0."""

from __future__ import annotations

import threading

TIMEOUT_S = 5


def digit_sum(response_text: str, answer: str, prompt_text: str) -> float:
    """1 if the last character of the scratchpad is the answer (tools/digit_sum.py)."""
    return float(response_text.strip()[-1:] == answer.strip())


def exact_match(response_text: str, answer: str, prompt_text: str) -> float:
    """1 if response and answer are the same text, blanks at both ends aside."""
    return float(response_text.strip() == answer.strip())


def math_verify(response_text: str, answer: str, prompt_text: str) -> float:
    """1 if the response's final expression (the last \\boxed, else the
    last expression) equals the answer, by math-verify.

    The answer may be plain ("1/2"), LaTeX without dollars or with them. An expression that takes longer than 5 s counts
    as wrong; the limit is a SIGALRM, which only the main thread can set, so in other threads there is none.
    """
    from math_verify import parse, verify

    limit = TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    gold = parse(answer if "$" in answer or "\\boxed" in answer else f"\\boxed{{{answer}}}", parsing_timeout=limit)
    return float(verify(gold, parse(response_text, parsing_timeout=limit), timeout_seconds=limit))
