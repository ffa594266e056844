"""The experts of an MoE layer as grouped products: two for all experts
forward, four backward, instead of a loop over the experts.

Parameters, their names and the sharded checkpoint are those of megatron-core's SequentialMLP. Under expert tensor
parallelism the result is this rank's partial sum, as there: the token dispatcher reduces it. Shape letters: N rows (a
token once for each expert it goes to, sorted by expert), E local experts, H hidden, F expert width on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import weighted_swiglu, weighted_swiglu_back
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

CACHE_BYTES = (
    2 << 20
)  # of fc1's result: on a CPU more rows than that are taken a few experts at a time (a sixth faster at 12,000 rows)
STRIDE_BYTES = 16  # torch's grouped_mm takes no other rows than multiples of these


def uneven_width(hidden: int, width: int, itemsize: int) -> str | None:
    """The width for which torch's grouped_mm cannot compute these experts, in words; None where it can.

    width: of an expert on one rank; itemsize: bytes of a number.
    """
    sizes = {"hidden_size": hidden, "the experts' width on a rank": width}
    bad = next((name for name, size in sizes.items() if size * itemsize % STRIDE_BYTES), None)
    return f"{bad} {sizes[bad]} is no multiple of {STRIDE_BYTES // itemsize}" if bad else None


class GroupedExperts(SequentialMLP):
    """SequentialMLP's parameters, one storage for each of fc1 and fc2,
    and one autograd node. Gated SiLU without biases.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        plain = not (
            config.add_bias_linear or config.fp8 or config.fp4 or config.moe_latent_size or config.glu_linear_offset
        )
        gated = (
            config.gated_linear_unit and config.activation_func is F.silu and config.activation_func_clamp_value is None
        )
        if not (plain and gated):
            raise ValueError(
                "grouped experts are gated SiLU without bias, clamp, offset, latent size or fp8; use "
                "engine.experts=sequential"
            )
        weight = self._weights("linear_fc2")[0]
        rows, columns = weight.shape
        if uneven := uneven_width(rows, columns, weight.element_size()):
            raise ValueError(f"grouped experts: {uneven}; use engine.experts=sequential")
        for weights in (self._weights("linear_fc1"), self._weights("linear_fc2")):
            storage = torch.stack([weight.data for weight in weights])
            for weight, view in zip(weights, storage, strict=True):
                weight.data = view

    def forward(self, hidden_NH: Tensor, tokens_per_expert: Tensor, probs_N: Tensor) -> tuple[Tensor, None]:
        if self.config.moe_apply_probs_on_input:
            hidden_NH = (probs_N[:, None] * hidden_NH).to(hidden_NH.dtype)
            probs_N = torch.ones_like(probs_N)
        fc1, fc2 = self._weights("linear_fc1"), self._weights("linear_fc2")
        fused = self.config.bias_activation_fusion
        if not hidden_NH.is_cpu:
            return _GatedExperts.apply(
                hidden_NH, probs_N, _ends(tokens_per_expert).to(hidden_NH.device, non_blocking=True), fused, *fc1, *fc2
            ), None
        blocks = _blocks(tokens_per_expert.tolist(), CACHE_BYTES // fc1[0][:, 0].nbytes)
        rows = [int(tokens_per_expert[block].sum()) for block in blocks]
        outs = [
            _GatedExperts.apply(x, probs, _ends(tokens_per_expert[block]), fused, *fc1[block], *fc2[block])
            for block, x, probs in zip(blocks, hidden_NH.split(rows), probs_N.split(rows), strict=True)
        ]
        return (outs[0] if len(outs) == 1 else torch.cat(outs)), None

    def _weights(self, linear: str) -> list[torch.nn.Parameter]:
        return [getattr(expert, linear).weight for expert in self.local_experts]


class _GatedExperts(torch.autograd.Function):
    """fc2_e(silu(gate) * up * prob) with [gate | up] = fc1_e(x), for
    the rows of every expert e. The activation is recomputed backward.

    fused: the activation by megatron-core's functions for torch.compile,
    one kernel each; else by torch's, in as little memory.
    """

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, probs_N: Tensor, ends_E: Tensor, fused: bool, *weights: Tensor) -> Tensor:
        fc1, fc2 = _split(weights)
        h_N2F = _product(x_NH, _stack(fc1).transpose(1, 2), ends_E)
        if fused:
            scaled_NF = weighted_swiglu(h_N2F, probs_N[:, None])
        else:
            gate, up = h_N2F.chunk(2, -1)
            scaled_NF = _scale_(F.silu(gate).mul_(up), probs_N)
        ctx.save_for_backward(x_NH, probs_N, ends_E, h_N2F, *weights)
        ctx.fused = fused
        return _product(scaled_NF, _stack(fc2).transpose(1, 2), ends_E)

    @staticmethod
    def backward(ctx: Any, dy_NH: Tensor) -> tuple[Tensor | None, ...]:
        x_NH, probs_N, ends_E, h_N2F, *weights = ctx.saved_tensors
        fc1, fc2 = _split(weights)
        dy_NH = dy_NH.contiguous()
        dscaled_NF = _product(dy_NH, _stack(fc2), ends_E)

        def fc2_gradient(scaled_NF: Tensor) -> list[Tensor | None]:
            return (
                _deliver(fc2, _product(dy_NH.t(), scaled_NF, ends_E)) if ctx.needs_input_grad[-1] else [None] * len(fc2)
            )

        if ctx.fused:
            dfc2 = fc2_gradient(weighted_swiglu(h_N2F, probs_N[:, None]))
            dh_N2F, dprobs_N1 = weighted_swiglu_back(dscaled_NF, h_N2F, probs_N[:, None])
            dprobs_N = dprobs_N1[:, 0]
        else:
            dh_N2F, dprobs_N, dfc2 = _activation_backward(dscaled_NF, h_N2F, probs_N, fc2_gradient)
        needs_x, needs_probs, _, _, needs_fc1, *_ = ctx.needs_input_grad
        dfc1 = _deliver(fc1, _product(dh_N2F.t(), x_NH, ends_E)) if needs_fc1 else [None] * len(fc1)
        dx_NH = _product(dh_N2F, _stack(fc1), ends_E) if needs_x else None
        return dx_NH, dprobs_N if needs_probs else None, None, None, *dfc1, *dfc2


def _activation_backward(
    dscaled_NF: Tensor, h_N2F: Tensor, probs_N: Tensor, fc2_gradient: Callable[[Tensor], list[Tensor | None]]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(dh, dprobs, what fc2_gradient makes of the activation). dscaled
    is used up; the activation lies where dh is written afterwards.
    """
    gate, up = h_N2F.chunk(2, -1)
    dh_N2F = torch.empty_like(h_N2F)
    dgate, dup = act_NF, silu_NF = dh_N2F.chunk(2, -1)  # one memory: first the activation, then the gradient
    torch.ops.aten.silu.out(gate, out=silu_NF)
    torch.mul(silu_NF, up, out=act_NF)
    dprobs_N = torch.linalg.vecdot(dscaled_NF.to(probs_N.dtype), act_NF.to(probs_N.dtype))
    dfc2 = fc2_gradient(_scale_(act_NF, probs_N))
    dact_NF = _scale_(dscaled_NF, probs_N)
    dup.mul_(dact_NF)
    torch.ops.aten.silu_backward.grad_input(dact_NF.mul_(up), gate, grad_input=dgate)
    return dh_N2F, dprobs_N, dfc2


def _ends(tokens_per_expert: Tensor) -> Tensor:
    return tokens_per_expert.cumsum(0).to(torch.int32)


def _blocks(tokens_per_expert: list[int], rows: int) -> list[slice]:
    """Consecutive experts, at most `rows` rows together unless one alone has more."""
    starts, block_rows = [0], 0
    for expert, tokens in enumerate(tokens_per_expert):
        if block_rows and block_rows + tokens > rows:
            starts.append(expert)
            block_rows = 0
        block_rows += tokens
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(tokens_per_expert)], strict=True)]


def _split(weights: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return weights[: len(weights) // 2], weights[len(weights) // 2 :]


def _scale_(act_NF: Tensor, probs_N: Tensor) -> Tensor:
    """Times the probability of the row, in the dtype of the activation
    and in its memory; taken in the wider of the two dtypes.
    """
    return act_NF.mul_(probs_N[:, None]) if act_NF.dtype == probs_N.dtype else act_NF.copy_(act_NF * probs_N[:, None])


def _product(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """a [N, i] with b [E, i, o] -> [N, o]; a [i, N] with b [N, o] ->
    [E, i, o]. ends_E int32: where each expert's rows end.
    """
    if a.numel():
        out = F.grouped_mm(a, b, offs=ends_E)
        if b.dim() == 2 and leaves_garbage(a.device):
            rows_E = ends_E.diff(prepend=ends_E.new_zeros(1))
            out.masked_fill_((rows_E == 0)[:, None, None], 0)
        return out
    # no rows at all on this rank: torch 2.13 cannot take it ("Invalid strides/sizes")
    return a.new_zeros(len(a), b.shape[2]) if b.dim() == 3 else a.new_zeros(len(ends_E), len(a), b.shape[1])


@cache
def leaves_garbage(device: torch.device) -> bool:
    """Whether grouped_mm leaves what was in memory as the weight gradient of an expert without rows: on Blackwell
    (pytorch#172439).
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def _stack(weights: Sequence[Tensor]) -> Tensor:
    """The weights as one [E, ...]: a view where they lie evenly in one storage, as __init__ has laid them, else a copy.

    The distributed optimizer moves parameters into a buffer of its own, last expert first: there it is a copy.
    """
    first = weights[0]
    addresses = [weight.data_ptr() for weight in weights]
    step = addresses[1] - addresses[0] if len(addresses) > 1 else first.nbytes
    same = all(weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for weight in weights)
    if (
        same
        and step >= first.nbytes
        and addresses == list(range(addresses[0], addresses[0] + len(addresses) * step, step))
    ):
        return first.as_strided((len(weights), *first.shape), (step // first.element_size(), *first.stride()))
    return torch.stack(list(weights))


def _deliver(weights: Sequence[Tensor], grads: Tensor) -> list[Tensor | None]:
    """Gradients [E, ...] go straight into Megatron's buffers, in one call, where there
    are any; else back to autograd.
    """
    expert_grads: list[Tensor | None] = [*grads.unbind()]
    if not hasattr(weights[0], "main_grad"):
        return expert_grads
    torch._foreach_add_([weight.main_grad for weight in weights], grads.unbind())  # type: ignore[attr-defined,arg-type]
    for weight in weights:
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return [None] * len(weights)
