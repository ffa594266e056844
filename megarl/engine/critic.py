"""PPO's critic: a Megatron model of its own, the policy's trunk with
one number a row for a head, in the policy's layout; replay is off.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl.config import Config
from megarl.engine.batch import Pack
from megarl.engine.model import build_model, load_weights, wrap_for_training
from megarl.engine.optim import build_optimizer
from megarl.engine.parallel import Parallel
from megarl.engine.step import Engine
from megarl.weights.map.relations import Replicated
from megarl.weights.map.weight_map import WeightMap, load_hf_config

VALUE_HEAD = "value_head.weight"


class ValueHead(torch.nn.Module):
    """V = w . h of every row, in place of GPTModel's output layer. w is replicated over tensor-parallel ranks.

    With sequence parallelism each rank has its own rows; every rank then computes the
    same loss of all of them, so that the gradient of its rows is its part of the
    incoming one, and that of w is summed over TP (its mark says so to Megatron).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.sequence_parallel = config.sequence_parallel

    def forward(
        self, hidden_SBH: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        values = F.linear(hidden_SBH, self.weight)
        if self.sequence_parallel:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None


class Critic(Engine):
    """`update` and `gradients` take a loss of (pack, values [T])."""

    def values(self, packs: list[Pack]) -> list[Tensor]:
        """V before each row's label is chosen, float32 [T] a pack, on the last stage (an empty list elsewhere)."""
        return [values for (values,) in self.outputs(packs, "off")]

    def _head(self, pack: Pack, out: Tensor, temperature: float) -> tuple[Tensor, ...]:
        return self._whole(pack, out.view(-1).float())


def value_map(hf_config: dict[str, Any]) -> WeightMap:
    """The family's map with the value head where the output layer was."""
    weight_map = WeightMap(hf_config)
    head: dict[str, Any] = {
        "hf_names": (VALUE_HEAD,),
        "hf_shapes": ((1, hf_config["hidden_size"]),),
        "relation": Replicated(),
        "copy": False,
    }
    weight_map.entries = tuple(
        replace(entry, **head) if entry.name == "output_layer.weight" else entry for entry in weight_map.entries
    )
    return weight_map


def build_critic(config: Config, parallel: Parallel, optimizer_steps: int) -> Critic:
    """Trunk from model.path, a head of zeros, an optimizer under critic.lr with the schedule of train.*."""
    lr = config.critic.lr
    critic_config = config.changed(train={"lr": lr, "min_lr": config.train.min_lr * lr / config.train.lr})
    model = build_model(critic_config, value_map(load_hf_config(config.model.path)), parallel, ValueHead)
    load_weights(model, config.model.path, fresh=VALUE_HEAD)
    wrap_for_training(model, critic_config)
    critic = Critic(model, temperature=1.0)
    critic.set_optimizer(*build_optimizer(critic_config, model, optimizer_steps))
    return critic
