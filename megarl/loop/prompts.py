"""The prompts of a run, read by every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megarl.config import Config
from megarl.data import Prompt, prompts_of
from megarl.observe.trace import enter


@dataclass(frozen=True)
class RunPrompts:
    """validation: empty where evaluation is off."""

    train: Sequence[Prompt]
    validation: Sequence[Prompt]


def load_run_prompts(config: Config, tokenizer: Any, *, asks: bool) -> RunPrompts:
    """data.prompts and eval.prompts. UserError as prompts_of; rank 0 says how rows were read and which were skipped.

    asks: whether this rank asks servers and scores; the others read their prompts too, and only count them.
    """
    enter("the reading of prompts")

    def say(line: str) -> None:
        if dist.get_rank() == 0:
            print(line, flush=True)

    def load(path: str) -> Sequence[Prompt]:
        prompts, bad = prompts_of(config, path, tokenizer, keeps=asks, say=say)
        if bad:
            say(f"{path}: skipped {bad} bad lines, kept {len(prompts)}")
        return prompts

    validation = load(config.eval.prompts)[: config.eval.max_prompts] if config.eval.prompts else []
    return RunPrompts(load(config.data.prompts), validation)
