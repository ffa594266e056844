"""A process that computes rewards for megarl.reward.pool: `python -m megarl.reward.worker NAME PARENT_PID`.

Reads one JSON list (response, answer, prompt) a line, answers one
{"value"} or {"fault"} a line, the first line of all being {}.
"""

from __future__ import annotations

import json
import os
import sys

from megarl.errors import UserError
from megarl.launch.lifeline import die_with_parent
from megarl.reward import get_reward


def main(name: str, parent: int) -> None:
    die_with_parent(parent)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a reward prints must not be taken for an answer
    reward = get_reward(name)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer: dict[str, object] = {"value": reward(*json.loads(line))}
        except UserError as error:
            answer = {"fault": str(error)}
        except Exception as error:  # a user's reward may raise anything
            answer = {
                "fault": f"data.reward {name!r} raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
