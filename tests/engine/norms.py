"""Run by test_vllm_faults.py: our norms of a float32 model on a CPU against vLLM's own, largest differences."""

from __future__ import annotations

import torch


def main() -> None:
    import vllm._custom_ops  # noqa: F401
    from vllm.ir.ops import layernorm
    from vllm.plugins import load_general_plugins

    from megarl.server.plugin import NORMS

    load_general_plugins()
    torch.manual_seed(0)
    whole = torch.randn(7, 192)
    error = 0.0
    for x in (torch.randn(5, 64), torch.randn(5, 4, 16), whole[:, :64], whole[:, :64].view(7, 4, 16)):
        weight, residual = torch.randn(x.shape[-1]), torch.randn(x.shape)
        ours, theirs = (layernorm.rms_norm.impls[name] for name in (NORMS, "native"))
        assert ours.supports_args(x, weight, 1e-6)
        assert not ours.supports_args(x.bfloat16(), weight.bfloat16(), 1e-6)
        pairs = [(ours.func_impl_fn(x, weight, 1e-6), theirs.func_impl_fn(x, weight, 1e-6))]
        ours, theirs = (layernorm.fused_add_rms_norm.impls[name] for name in (NORMS, "native"))
        assert ours.supports_args(x, residual, weight, 1e-6) == x.is_contiguous()
        if x.is_contiguous():
            given = x, residual, weight, 1e-6
            pairs += zip(ours.func_impl_fn(*given), theirs.func_impl_fn(*given), strict=True)
        error = max(error, *(float((a - b).abs().max()) for a, b in pairs))
    print(f"\nerror={error:.3e}")


if __name__ == "__main__":
    main()
