"""The norm of all gradients in one pass is megatron-core's, to the last bit."""

from __future__ import annotations

import torch

from megarl.engine.device import setup_device
from megarl.engine.grad_norm import l2_norm


def test_the_norm_is_megatron_cores_to_the_last_bit() -> None:
    setup_device()
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    assert clip_grads.l2_norm_impl is l2_norm
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(1, 3000, (int(torch.randint(1, 100, (1,), generator=draw)),), generator=draw).tolist()
        grads = [torch.randn(size, generator=draw) for size in sizes]
        theirs, ours = (norm(0, None, [grads], False)[0] for norm in (local_multi_tensor_l2_norm, l2_norm))
        assert torch.equal(theirs, ours) and theirs.shape == ours.shape
