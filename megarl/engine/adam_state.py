"""What a checkpoint keeps of the optimizer: Adam's moments and the float32 master weights, cut as the model's tensors.

megatron-core's own state also holds its parameter groups, one list for each optimizer that it chains: their number
depends on the layout, and their lr, betas and eps would win over the configuration's. So only tensors are kept here, by
the key of the parameter they belong to, which every layout knows; the one number of Adam's state, its count of steps,
is the schedule's.

Of megatron-core 0.16 this uses DistributedOptimizer.sharded_param_state_fully_reshardable and its counterpart, and the
groups of Float16OptimizerWithFloat16Params. Held by tests/parallel/test_resume.py and
tests/unit/test_checkpoints.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megarl.engine.hybrid_adam import settle, stepping

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"
PREFIX = "optimizer.state"

# of one part of the optimizer: number of a parameter within it -> name of its state -> what dist_checkpointing saves
State = dict[int, dict[str, Any]]


def parts_of(optimizer: Any) -> Iterator[Any]:
    """The optimizers that Megatron chains: one for dense and one for expert parameters, where this rank holds such."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            yield part


def sharded_state(optimizer: Any, weights: dict[str, Any], *, loading: bool) -> dict[str, State]:
    """The state for dist_checkpointing's save or load. Collective with the distributed optimizer.

    weights: the model's sharded state, of the same layout, from which each tensor takes its place.
    """
    return {
        str(i): _of_shards(part, weights, loading)
        if isinstance(part, DistributedOptimizer)
        else _of_tensors(part, weights)
        for i, part in enumerate(parts_of(optimizer))
    }


def restore_state(optimizer: Any, loaded: dict[str, State], steps: int) -> None:
    """Fills the optimizer from what was loaded. steps: optimizer steps that it had done.

    The model's weights come first: a float32 parameter is its own master weight.
    """
    for i, part in enumerate(parts_of(optimizer)):
        if isinstance(part, DistributedOptimizer):
            _fill_shards(part, loaded[str(i)])
        else:
            _fill_tensors(part, loaded[str(i)])
        _set_steps(part.optimizer, steps)


def _of_tensors(part: Any, weights: dict[str, Any]) -> State:
    _give_moments(part.optimizer)
    places = {id(sharded.data): sharded for sharded in nested_values(extract_sharded_tensors_and_factories(weights)[0])}
    return {
        i: {
            name: make_sharded_optimizer_tensor(places[id(param)], tensor, f"{PREFIX}.{name}")
            for name, tensor in _tensors(part, param, master).items()
        }
        for i, (param, master) in enumerate(_masters(part))
    }


def _fill_tensors(part: Any, loaded: State) -> None:
    for i, (param, master) in enumerate(_masters(part)):
        for name, tensor in _tensors(part, param, master).items():
            tensor.detach().copy_(loaded[i][name])


def _masters(part: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(the model's parameter, what Adam steps on) of a part that is not distributed."""
    if not hasattr(part, "float16_groups"):
        return [(param, param) for group in part.optimizer.param_groups for param in group["params"]]
    groups = [
        *zip(part.float16_groups, part.fp32_from_float16_groups, strict=True),
        *zip(part.fp32_from_fp32_groups, part.fp32_from_fp32_groups, strict=True),
    ]
    return [pair for params, masters in groups for pair in zip(params, masters, strict=True)]


def _tensors(part: Any, param: torch.Tensor, master: torch.Tensor) -> dict[str, torch.Tensor]:
    state = part.optimizer.state[master]
    master_entry = {} if master is param else {MASTER: master}
    return {**{name: state[name] for name in MOMENTS}, **master_entry}


def _of_shards(part: DistributedOptimizer, weights: dict[str, Any], loading: bool) -> State:
    """Whole parameters, gathered over the data-parallel ranks: which elements a rank holds depends on their number."""
    _give_moments(part.optimizer)
    whole = part.sharded_param_state_fully_reshardable(weights, is_loading=loading, metadata={})
    for i, param in enumerate(_sharded_params(part)):
        master = whole[i].pop("param")
        if param.dtype != torch.float32:
            master.key = master.key.replace(f"{PREFIX}.param.", f"{PREFIX}.{MASTER}.", 1)
            whole[i][MASTER] = master
    return whole


def _fill_shards(part: DistributedOptimizer, loaded: State) -> None:
    for state in part.optimizer.state.values():
        state.pop("step", None)  # torch's Adam: the loader would copy into it, too
    for i, param in enumerate(_sharded_params(part)):
        loaded[i].setdefault(MASTER, param.detach())
    part.load_parameter_state_from_fully_reshardable(loaded)


def _sharded_params(part: DistributedOptimizer) -> list[torch.Tensor]:
    """In the order in which megatron-core numbers them."""
    return [param for buffer in part.buffers for param in buffer.param_index_map]


def _give_moments(inner: torch.optim.Optimizer) -> None:
    """Gives an Adam without a step so far the state of step 0: megatron-core can neither save nor load it without."""
    for optimizer in stepping(inner):
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if not optimizer.state[tensor]:
                    optimizer.state[tensor].update({name: torch.zeros_like(tensor) for name in MOMENTS})
        if _counts_by_parameter(optimizer) and not any("step" in state for state in optimizer.state.values()):
            _count(optimizer, 0)
    settle(inner)


def _set_steps(inner: torch.optim.Optimizer, steps: int) -> None:
    for optimizer in stepping(inner):
        _count(optimizer, steps)
    settle(inner)


def _count(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Transformer Engine's and Apex's Adam count in the group; torch's in a tensor of each parameter, which must be its
    own (a shared one would advance once for each), beside the parameter where Adam is fused.
    """
    for group in optimizer.param_groups:
        if not _counts_by_parameter(optimizer):
            group["step"] = steps
            continue
        for tensor in group["params"]:
            device = tensor.device if group.get("fused") else "cpu"
            optimizer.state[tensor]["step"] = torch.tensor(float(steps), dtype=torch.float32, device=device)


def _counts_by_parameter(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
