"""Run by test_vllm_faults.py: the error of vLLM's CPU rotary embedding
on a query with an axis of heads, without and with our plugin.
"""

from __future__ import annotations

import torch


def main() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.plugins import load_general_plugins

    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(
            32,
            64,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            is_neox_style=False,
            dtype=torch.float32,
        )
    positions, query, key = torch.arange(7), torch.randn(7, 4, 48), torch.randn(7, 1, 64)

    def error() -> float:
        mine, theirs = query.clone()[..., 16:], key.clone()[..., 32:]  # views, as DeepSeek's attention passes them
        expected = rope.forward_native(positions, mine.clone(), theirs.clone())
        return max(float((a - b).abs().max()) for a, b in zip(expected, rope.forward_cpu(positions, mine, theirs)))

    alone = error()
    load_general_plugins()
    print(f"\nalone={alone:.3e} ours={error():.3e}")


if __name__ == "__main__":
    main()
