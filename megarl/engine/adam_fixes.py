"""megatron-core 0.16 with torch's Adam (no Apex, no Transformer
Engine): four faults in saving and loading the optimizer, mended.

torch's Adam keeps a `step` tensor for each parameter, which megatron-core's loaders do not expect. Held by
tests/parallel/ranks.py,
resume_is_exact, and tests/unit/test_first_checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def parts_of(optimizer: Any) -> Iterator[Any]:
    """The optimizers that Megatron chains: one for dense and one for expert parameters."""
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


def before_saving(optimizer: Any) -> None:
    """Gives an optimizer without a step so far the state of step 0:
    without it a distributed one cannot be saved, and others not loaded.
    """
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        for part in parts_of(optimizer):
            _give_state(part)


def before_loading(optimizer: Any) -> None:
    """The same for a distributed optimizer, which cannot describe
    itself to the loader (distrib_optimizer.py, state_dict).

    Its loader copies into every entry of a parameter's state, but a checkpoint has none for `step`
    (_set_main_param_and_optimizer_states).
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    for part in parts_of(optimizer):
        if isinstance(part, DistributedOptimizer):
            _give_state(part)
            part._set_main_param_and_optimizer_states = _without_step(part)


def restore_step_0(loaded: Any) -> None:
    """In a loaded state of the optimizer: megatron-core leaves the
    common step out where it is 0 (optimizer.py:845,1033).
    """
    if not isinstance(loaded, dict) or distrib_optimizer.HAVE_APEX_OR_TE:
        return
    state = loaded.get("state")
    if (
        isinstance(state, dict)
        and state
        and all(isinstance(one, dict) and "exp_avg" in one and "step" not in one for one in state.values())
    ):
        state["common_step"] = torch.zeros(())
    for inner in loaded.values():
        restore_step_0(inner)


def _give_state(part: Any) -> None:
    inner = getattr(part, "optimizer", None)
    for group in inner.param_groups if inner is not None else []:
        for tensor in group["params"]:
            if not inner.state[tensor]:
                zeros = {key: torch.zeros_like(tensor) for key in ("exp_avg", "exp_avg_sq")}
                inner.state[tensor].update(
                    step=torch.zeros((), device=tensor.device if group.get("fused") else "cpu"), **zeros
                )


def _without_step(part: Any) -> Any:
    original = type(part)._set_main_param_and_optimizer_states

    def load(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, place = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
        step = state.pop("step")
        try:
            original(part, model_param, tensors)
        finally:
            state["step"] = step

    return load


def after_loading(optimizer: Any) -> None:
    """Loading leaves one `step` tensor shared by all parameters, which
    a step then advances once for each of them: gives each its own.
    """
    for part in parts_of(optimizer):
        inner = getattr(part, "optimizer", None)
        fused = inner is not None and any(
            group.get("fused") for group in inner.param_groups
        )  # wants `step` beside the parameter
        for param, state in inner.state.items() if inner is not None else []:
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].to(param.device, copy=True) if fused else state["step"].clone()
