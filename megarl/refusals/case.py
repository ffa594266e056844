"""What a refusal looks at."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megarl.checkpoints import hf_files
from megarl.config import Config

if TYPE_CHECKING:
    from megarl.weights.map.weight_map import WeightMap


@dataclass(frozen=True)
class Case:
    """A command with its configuration. `world` is the number of
    trainer ranks; `hf` the parsed config.json of model.path; `notes` what the user should know though nothing is wrong.
    """

    command: str
    config: Config
    world: int
    given_hf: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def hf(self) -> dict[str, Any]:
        if self.given_hf is not None:
            return self.given_hf
        return json.loads((hf_files(self.config.model.path) / "config.json").read_text(encoding="utf-8"))

    @cached_property
    def weight_map(self) -> WeightMap:
        from megarl.weights.map.weight_map import WeightMap

        return WeightMap(self.hf)

    @property
    def model(self) -> dict[str, Any]:
        """Megatron's names: num_layers, num_attention_heads, num_query_groups, num_moe_experts, ..."""
        return self.weight_map.model

    @property
    def dp(self) -> int:
        parallel = self.config.parallel
        return self.world // (parallel.tp * parallel.pp * parallel.cp)
