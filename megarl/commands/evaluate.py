"""`megarl eval`: mean@k and pass@k of a model on eval.prompts, and all its responses to read.

Writes the rows of `megarl generate`, without routes: eval.samples responses a prompt at eval.temperature, with the
reward that training gives.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from megarl.commands.arguments import parse
from megarl.commands.jsonl import rows_to
from megarl.commands.responses import respond
from megarl.config import load_config
from megarl.data import load_tokenizer, prompts_of
from megarl.errors import UserError
from megarl.reward.figures import evaluation_figures
from megarl.reward.pool import Score


def main(argv: list[str]) -> int:
    args = parse("eval", argv)
    config = load_config(args.config, args.overrides)
    settings = config.eval
    if settings.prompts is None:
        raise UserError("eval.prompts is unset; give a file of prompts with answers")
    tokenizer = load_tokenizer(config.model)
    prompts, bad = prompts_of(config, settings.prompts, tokenizer, say=print)
    prompts = prompts[: settings.max_prompts]
    scores: list[Score] = []
    lengths: list[int] = []
    cut = 0
    with rows_to(args.output) as write:
        for answered in respond(config, tokenizer, prompts, settings.samples, settings.temperature):
            scores += answered.scores
            lengths += [len(response.logprobs) for response in answered.responses]
            cut += sum(response.truncated for response in answered.responses)
            for row in answered.rows():
                write(row)
    figures = {
        "prompts": len(prompts),
        "bad_lines": bad,
        **evaluation_figures(scores, settings.samples, config.data.pass_threshold),
        "response/length_mean": float(np.mean(lengths)),
        "response/truncated_frac": cut / len(lengths),
        "output": args.output,
    }
    print(json.dumps(figures) if args.json else summary(figures, scores))
    return 0


def summary(figures: dict[str, Any], scores: list[Score]) -> str:
    """For a terminal."""
    k = int(figures["eval/k"])
    lines = [
        f"mean@{k} {figures['eval/mean_at_k']:.4f}  pass@{k} {figures['eval/pass_at_k']:.4f}"
        if "eval/mean_at_k" in figures
        else "no response has a reward",
        f"{figures['prompts']} prompts, {figures['response/length_mean']:.1f} tokens a response, "
        f"{figures['response/truncated_frac']:.1%} cut at rollout.max_new_tokens; responses: {figures['output']}",
    ]
    if figures["bad_lines"]:
        lines.append(f"{figures['bad_lines']} bad lines of eval.prompts were skipped")
    if faults := [score.fault for score in scores if score.fault]:
        lines.append(f"{len(faults)} responses without a reward are left out, the first: {faults[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
