"""Peak memory of the log-probability pass beside its logits, against a
plain log_softmax, and whether the gradients agree.

    python tools/bench/logprob.py [--tokens 8192] [--vocabulary 151936] [--json FILE]

Each variant runs forward and backward in a process of its own, over the same
bfloat16 logits; what is printed is the growth of the peak resident memory over the
moment before, in GiB, without the gradient of the logits, which both must return.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(variant: str, tokens: int, vocabulary: int, pipe: Any) -> None:
    import torch

    from megarl.engine.logprob import vocab_parallel_logprobs

    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(tokens, vocabulary, dtype=torch.bfloat16).requires_grad_()
    with torch.no_grad():
        for part in logits.split(64):
            part.copy_(torch.randn(part.shape, generator=generator))
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    weight = torch.randn(tokens, generator=generator)
    before = peak_gib()
    if variant == "ours":
        logprobs, _ = vocab_parallel_logprobs(logits, labels)
    else:
        logprobs = logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (logprobs * weight).sum().backward()
    assert logits.grad is not None
    grown = peak_gib() - before - logits.grad.numel() * 2 / 2**30
    pipe.send((grown, logprobs[:256].detach().numpy(), logits.grad[:256].float().numpy()))
    pipe.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    grown, values = {}, {}
    for variant in ("ours", "plain"):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=run, args=(variant, args.tokens, args.vocabulary, send))
        process.start()
        grown[variant], *values[variant] = receive.recv()
        process.join()
        print(f"{variant:6} {grown[variant]:.3f} GiB beside the logits and their gradient", flush=True)
    ratio = grown["ours"] / grown["plain"]
    (ours, our_grad), (plain, plain_grad) = values["ours"], values["plain"]
    difference = float(abs(our_grad - plain_grad).max() / abs(plain_grad).max())
    print(
        f"ratio  {ratio:.3f}; log-probabilities differ by {abs(ours - plain).max():.1e}, gradients by "
        f"{difference:.1e} relative"
    )
    if args.json:
        work = {"tokens": args.tokens, "vocabulary": args.vocabulary}
        args.json.write_text(
            json.dumps({**work, "gib": grown, "ratio": ratio, "gradient_difference": difference}) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
