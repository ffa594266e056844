"""Run by test_vllm_faults.py: the norms of our servers on a CPU against vLLM's own, largest differences in float32."""

from __future__ import annotations

import os

import torch

from megarl.server.plugin import OWN_SERVER


def main() -> None:
    os.environ[OWN_SERVER] = "1"
    import vllm._custom_ops  # noqa: F401
    from vllm.config import VllmConfig
    from vllm.ir.ops import layernorm
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from megarl.server.vllm_patches import NORMS

    chosen = current_platform.get_default_ir_op_priority(VllmConfig())
    assert chosen.rms_norm == chosen.fused_add_rms_norm == [NORMS, "native"]
    torch.manual_seed(0)
    norm, both = (
        [op.impls[name] for name in (NORMS, "native")] for op in (layernorm.rms_norm, layernorm.fused_add_rms_norm)
    )
    whole = torch.randn(7, 192)
    error = 0.0
    for x in (torch.randn(5, 64), torch.randn(5, 4, 16), whole[:, :64], whole[:, :64].view(7, 4, 16)):
        weight, residual = torch.randn(x.shape[-1]), torch.randn(x.shape)
        assert norm[0].supports_args(x, weight, 1e-6)
        assert both[0].supports_args(x, residual, weight, 1e-6) == x.is_contiguous()
        pairs = [tuple(way.func_impl_fn(x, weight, 1e-6) for way in norm)]
        if x.is_contiguous():
            pairs += zip(*(way.func_impl_fn(x, residual, weight, 1e-6) for way in both), strict=True)
        error = max(error, *(float((a - b).abs().max()) for a, b in pairs))
    for x in (torch.randn(5, 20), torch.randn(5, 64).bfloat16()):
        assert not norm[0].supports_args(x, torch.ones(x.shape[-1]), 1e-6)
        assert not both[0].supports_args(x, x, torch.ones(x.shape[-1]), 1e-6)
    print(f"\nerror={error:.3e}")


if __name__ == "__main__":
    main()
