"""`megarl generate`: responses of the rollout engine to given prompts, in the format that `megarl score` reads.

In:  {"messages" | "prompt", "answer"?} a line. Out: {"tokens", "prompt_len", "logprobs", "routes", "weight_versions",
"finish_reason"},
batch.group lines a prompt, in the order of the input.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megarl.commands.arguments import parse
from megarl.commands.score import encode_npy
from megarl.config import load_config
from megarl.data import load_tokenizer, prompts_of, vocabulary_of
from megarl.rollout.fleet import Fleet


def main(argv: list[str]) -> int:
    args = parse("generate", argv)
    config = load_config(args.config, args.overrides)
    tokenizer = load_tokenizer(config.model)
    prompts, _ = prompts_of(config, args.input, tokenizer, needs_answer=False)
    dist.init_process_group("gloo")
    fleet = Fleet(config, torch.device("cpu"), is_ingest=True)
    assert fleet.client is not None
    try:
        with fleet.watched():
            stop = list(vocabulary_of(config, tokenizer).ends)
            tokens = [prompt.tokens for prompt in prompts]
            rollout = config.rollout
            groups = fleet.client.generate(
                tokens, config.batch.group, rollout.temperature, rollout.max_new_tokens, stop, seed=config.run.seed
            )
    finally:
        fleet.close()
    partial = Path(args.output + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for response in (response for group in groups for response in group):
            row = {
                "tokens": response.tokens.tolist(),
                "prompt_len": response.prompt_len,
                "logprobs": response.logprobs.tolist(),
                "routes": None if response.routes is None else encode_npy(response.routes),
                "weight_versions": response.weight_versions,
                "finish_reason": response.finish_reason,
            }
            file.write(json.dumps(row) + "\n")
    os.replace(partial, args.output)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
