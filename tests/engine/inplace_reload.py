"""Run by test_vllm_faults.py: vLLM in this process reloads checkpoint B
over A, then prints its largest error against transformers' B.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

import numpy as np


def main(a: str, b: str) -> None:
    from vllm import LLM, SamplingParams

    from tests.engine.support import judged, prompts

    llm = LLM(
        a,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        kv_cache_memory_bytes=2**26,
        skip_tokenizer_init=True,
        seed=0,
    )
    llm.collective_rpc("reload_weights", kwargs={"weights_path": b})
    llm.reset_prefix_cache()
    sampling = SamplingParams(temperature=1.0, max_tokens=8, logprobs=0, detokenize=False, ignore_eos=True)
    worst = 0.0
    for output in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts(4, 20)], sampling, use_tqdm=False):
        choice = output.outputs[0]
        expected, _ = judged(Path(b), [*output.prompt_token_ids, *choice.token_ids])
        found = np.array([entry[token].logprob for entry, token in zip(choice.logprobs, choice.token_ids)])
        worst = max(worst, float(np.abs(found - expected[19:]).max()))
    print(f"\nworst={worst:.3e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
