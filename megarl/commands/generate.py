"""`megarl generate`: responses of the rollout engine to given prompts, in the format that `megarl score` reads.

In:  a row of docs/your_own_data.md a line; the answer may be missing.
Out: {"prompt", "text", "answer", "reward", "finish_reason", "tokens", "prompt_len", "logprobs", "routes",
"weight_versions"} a line, batch.group lines a prompt, in the order of the input. answer and reward are there where the
input has an answer that data.reward can judge by; a reward that failed is null, and "reward_fault" says why.
"""

from __future__ import annotations

import sys

from megarl.commands.arguments import parse
from megarl.commands.jsonl import rows_to
from megarl.commands.responses import respond
from megarl.config import load_config
from megarl.data import load_tokenizer, prompts_of


def main(argv: list[str]) -> int:
    args = parse("generate", argv)
    config = load_config(args.config, args.overrides)
    tokenizer = load_tokenizer(config.model)
    prompts, _ = prompts_of(config, args.input, tokenizer, needs_answer=False)
    with rows_to(args.output) as write:
        for answered in respond(config, tokenizer, prompts, config.batch.group, config.rollout.temperature):
            for row in answered.rows():
                write(row)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
