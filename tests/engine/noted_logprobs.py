"""Log-probabilities of a request that comes in pieces, noted as vLLM does and at once (vllm_patches.py, 10): prints
whether all that vLLM notes is the same. Run by test_vllm_faults.py.
"""

from __future__ import annotations

import os
from dataclasses import asdict

import numpy as np
from vllm.logprobs import FlatLogprobs
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists

from megarl.server import vllm_patches
from megarl.server.plugin import OWN_SERVER

PIECES = (3, 1, 5)  # positions


def noted(update: object, wide: bool = False) -> dict[str, object]:
    processor = LogprobsProcessor(
        tokenizer=None,
        logprobs=FlatLogprobs(),
        prompt_logprobs=None,
        cumulative_logprob=-0.5,
        num_logprobs=int(wide),
        num_prompt_logprobs=None,
    )
    rng = np.random.default_rng(0)
    for positions in PIECES:
        shape = positions, 1 + wide
        update(  # type: ignore[operator]
            processor,
            LogprobsLists(
                rng.integers(0, 16, shape).astype(np.int32),
                -rng.random(shape).astype(np.float32),
                rng.integers(1, 16, positions).astype(np.int32),
            ),
        )
    return {**asdict(processor.logprobs), "sum": processor.cumulative_logprob}  # type: ignore[call-overload]


def main() -> None:
    os.environ[OWN_SERVER] = "1"
    vllm_patches.apply()
    ours = LogprobsProcessor._update_sample_logprobs
    theirs = ours._original  # type: ignore[attr-defined]
    same = all(noted(ours, wide=wide) == noted(theirs, wide=wide) for wide in (False, True))
    print(f"same={int(same)} positions={len(noted(ours)['logprobs'])}")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
