"""The rewards that come with megarl: each 1.0 or 0.0. Their parameters are names of megarl.reward.inputs."""

from __future__ import annotations


def digit_sum(response: str, answer: str) -> float:
    """1 if the last character of the scratchpad is the answer (tools/digit_sum.py)."""
    return float(response.strip()[-1:] == answer.strip())


def exact_match(final_response: str, answer: str) -> float:
    """1 if what follows the thoughts and the answer are the same text, blanks at both ends aside."""
    return float(final_response.strip() == answer.strip())


def math_verify(final_response: str, answer: str) -> float:
    r"""1 if the final expression (the last \boxed, else what follows ####, else the last expression) equals the answer.
    See megarl.reward.maths.
    """
    from megarl.reward.maths import equal_answers

    return float(equal_answers(final_response, answer))
