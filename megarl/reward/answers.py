r"""Where the final answer stands in a text: behind the thoughts, in the last \boxed, after GSM8K's ####."""

from __future__ import annotations

import re
from collections.abc import Sequence


def after_thoughts(response: str, prompt: str, tags: Sequence[str]) -> str:
    """What follows the model's thoughts; "" where they never end. tags: (opening, closing), or none at all.

    A prompt that ends with the opening tag has begun them. A response without a tag is all answer.
    """
    if not tags:
        return response
    opening, closing = tags
    _, closed, rest = response.rpartition(closing)
    if closed:
        return rest.partition(opening)[0]
    return "" if opening in response or prompt.rstrip().endswith(opening) else response


def after_hashes(text: str) -> str | None:
    """What follows the last ####, GSM8K's mark of the answer, on its line; None without one."""
    marked = re.findall(r"(?:^|\s)####[ \t]*(?!#)(\S.*)$", text, re.MULTILINE)
    if not marked:
        return None
    answer = marked[-1].strip()
    return answer.replace(",", "") if re.fullmatch(r"[-+]?[\d,]+(\.\d+)?", answer) else answer


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}; "" where it is never closed, None where there is none."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    depth, first = 0, text.index("{", start)
    for match in re.finditer(r"\\.|[{}]", text[first:], re.DOTALL):  # a brace behind a backslash is a character
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if not depth:
            return text[first + 1 : first + match.start()].strip()
    return ""
