"""The sections data and eval: what is trained on, what judges a response, and when the policy is evaluated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from megarl.config.sections import LONGEST_S, MOST_RESPONSES, Section


class DataConfig(Section):
    prompts: str = Field(
        "",
        description=(
            "Training prompts: JSONL (.gz too), Parquet, or a folder saved by datasets; {messages | prompt, answer} or "
            "a shape of docs/your_own_data.md."
        ),
    )
    columns: dict[Literal["prompt", "answer", "response", "tools"], str] = Field(
        {},
        description=(
            "Where your rows have them, e.g. {prompt: text, answer: reward_model.ground_truth}; else the keys of "
            "docs/your_own_data.md."
        ),
    )
    reward: str = Field(
        "exact_match",
        description=(
            "digit_sum, exact_match, math_verify, or a dotted path module.function; called by parameter names "
            "(docs/your_own_data.md)."
        ),
    )
    thinking_tags: list[str] = Field(
        ["<think>", "</think>"],
        description="What opens and closes thoughts: an answer inside them does not count; empty: there are none.",
    )
    pass_threshold: float = Field(
        1.0, description="A response passes (pass@g, pass@k) if its reward is at least this much."
    )
    reward_workers: int = Field(
        2, ge=1, description="Processes a data-parallel replica that run math_verify or a reward of one's own."
    )
    reward_timeout_s: float = Field(
        15, gt=0, le=LONGEST_S, description="Time limit of one such reward, in seconds; see train.on_bad_batch."
    )
    reward_env: list[str] = Field(
        [],
        description="Environment variables that these processes see besides PATH, HOME, PYTHONPATH and the like.",
    )
    overlong_buffer: int = Field(
        0, ge=0, description="Tokens before rollout.max_new_tokens over which a length penalty grows; 0 is off."
    )
    overlong_penalty: float = Field(
        1.0, ge=0, description="The penalty at rollout.max_new_tokens, taken off the reward (DAPO)."
    )
    on_bad_line: Literal["error", "skip"] = Field(
        "error", description="A malformed JSONL line: stop and name it, or skip and count it."
    )
    loader: Literal["torch", "dali"] = Field(
        "torch",
        description=(
            "What reads the cold start's demonstrations ahead: a thread with torch, or DALI (extra dali). Same batches."
        ),
    )
    shuffle: bool = Field(True, description="Shuffle the prompts anew each epoch, seeded by run.seed.")

    @field_validator("thinking_tags")
    @classmethod
    def _two_tags(cls, value: list[str]) -> list[str]:
        if value and (len(value) != 2 or not all(value)):
            raise ValueError("give the opening and the closing tag, or []")
        return value


class EvalConfig(Section):
    prompts: str | None = Field(None, description="Validation prompts, JSONL; unset turns evaluation off.")
    every: int = Field(0, ge=0, description="Evaluate every this many steps, and at the end; 0 is only at the end.")
    samples: int = Field(1, ge=1, le=MOST_RESPONSES, description="Responses a prompt (k of mean@k and pass@k).")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature of the evaluation; 0 is greedy.")
    max_prompts: int = Field(256, ge=1, description="Use at most this many prompts of the file.")
