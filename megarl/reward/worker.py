"""A process that computes rewards for megarl.reward.pool: `python -m megarl.reward.worker NAME PARENT_PID`.

Its first line says which arguments the reward takes, {"required", "optional", "everything"}, or {"fault"} where there
is no such reward. Then it reads one JSON object of arguments a line and answers one {"value"} or {"fault"} a line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys

from megarl.errors import UserError
from megarl.launch.lifeline import die_with_parent
from megarl.reward import RewardInput, get_reward


def main(name: str, parent: int) -> None:
    die_with_parent(parent)
    # What a reward prints or reads must not be taken for an answer or a question.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        reward = get_reward(name)
    except UserError as error:
        print(json.dumps({"fault": str(error)}), file=answers, flush=True)
        return
    if name == "math_verify":  # its first call imports sympy, whose time is no sample's
        reward(RewardInput("\\boxed{2/4}", "0.5", ""))
    print(json.dumps(dataclasses.asdict(reward.wanted)), file=answers, flush=True)
    for line in questions:
        try:
            answer: dict[str, object] = {"value": reward.value(json.loads(line))}
        except UserError as error:
            answer = {"fault": str(error)}
        except Exception as error:  # a user's reward may raise anything
            answer = {
                "fault": f"data.reward {name!r} raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
