"""Run by test_vllm_faults.py: tokens of requests with and without a seed, as our servers on a CPU sample them and as
vLLM does: whether they are the same, and how often ours ask a request's generator.
"""

from __future__ import annotations

import os

import torch

from megarl.server.plugin import OWN_SERVER

STEPS, ROWS, SEEDED = 100, 6, (0, 2, 5)


def main() -> None:
    os.environ[OWN_SERVER] = "1"
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    ours, sampler = TopKTopPSampler.forward_cpu, TopKTopPSampler("processed_logprobs")
    sampled, calls, randint = [], [], torch.randint

    def counted(*args: object, **keywords: object) -> torch.Tensor:
        calls.append(keywords.get("generator"))
        return randint(*args, **keywords)  # type: ignore[call-overload, no-any-return]

    for way in (ours._original, ours):
        calls.clear()
        torch.randint = counted  # type: ignore[assignment]
        torch.manual_seed(3)
        generators = {row: torch.Generator().manual_seed(row) for row in SEEDED}
        steps = []
        for step in range(STEPS):
            if step == STEPS // 2:  # a request ends, another moves to its row
                generators = {0: generators[5], 2: generators[2], 4: torch.Generator().manual_seed(9)}
            logits = torch.randn(ROWS, 50, generator=torch.Generator().manual_seed(step))
            steps.append(way(sampler, logits, generators, None, None))
        torch.randint = randint
        sampled.append(steps)
    same = all(torch.equal(a, b) for one, other in zip(*sampled, strict=True) for a, b in zip(one, other, strict=True))
    print(f"\nsame={int(same)} calls={sum(generator is not None for generator in calls)}")


if __name__ == "__main__":
    main()
