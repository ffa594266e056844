"""One weight map: for every Megatron parameter, which Hugging Face tensors it holds and how the two lie in each other.

Every relation comes down to rectangles: a slice of a Hugging Face tensor that equals a slice of this
rank's parameter (`Piece`). Loading, gathering and verifying all read the same list of rectangles, so
there is no second source of truth. A family is a table of `Entry` (megarl/weights/map/families/); the
sizes come from the Hugging Face config.json. See docs/families.md.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from megarl.checkpoints import hf_files
from megarl.errors import UserError, shown
from megarl.weights.map.layout import Coord, Layout
from megarl.weights.map.relations import Piece, Rank, Relation, Replicated
from megarl.weights.rect import Shape

FAMILIES = {  # model_type of config.json -> module
    "deepseek_v3": "megarl.weights.map.families.deepseek_v3",
    "glm4_moe": "megarl.weights.map.families.glm4_moe",
    "llama": "megarl.weights.map.families.llama",
    "mixtral": "megarl.weights.map.families.mixtral",
    "qwen2_moe": "megarl.weights.map.families.qwen2_moe",
    "qwen3": "megarl.weights.map.families.qwen3",
    "qwen3_moe": "megarl.weights.map.families.qwen3_moe",
}

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")  # without which there is no model
COUNTS = (
    *("intermediate_size", "moe_intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
)  # null, too, where the family has a default
SWITCHES = ("tie_word_embeddings", "norm_topk_prob", "attention_bias", "use_sliding_window")


def _wrong_kind(config: dict[str, Any]) -> str | None:
    """Which value of config.json is a text in the place of a number, or the like."""
    rope = config.get("rope_parameters")
    for key, value in {**config, **(rope if isinstance(rope, dict) else {})}.items():
        if (key in SIZES or (key in COUNTS and value is not None)) and (type(value) is not int or value < 0):
            wants = "a whole number"
        elif key in SIZES and value == 0:
            wants = "more than 0"
        elif key in ("rms_norm_eps", "rope_theta") and not (value is None or type(value) in (int, float)):
            wants = "a number"
        elif key in SWITCHES and not isinstance(value, bool | None):
            wants = "true or false"
        else:
            continue
        return f"model.path: config.json has {key} {shown(value)}, it must be {wants}; copy the checkpoint's again"
    return None


@dataclass(frozen=True)
class Param:
    """A parameter of one rank: its name inside its model chunk, its local shape and what it holds.

    replica is 0 on exactly one rank for each distinct content: that rank is the one that sends it.
    """

    chunk: int
    name: str
    shape: Shape
    pieces: tuple[Piece, ...]
    replica: int
    expert: bool
    split: bool  # cut over tensor-parallel ranks (if there are several)
    buffer: bool  # not trained, and float32 whatever the dtype of the model


@dataclass(frozen=True)
class Entry:
    """A row of a family's table. Names hold {layer} and {expert} where
    they occur; `relation` cuts the Hugging Face tensors into pieces.

    hf_shapes: of those tensors, whole. where: in which layers ("moe":
    those with experts, "dense": the others), or before or behind them.
    copy: a second place of a tensor that the first stage holds (tied embeddings), there only where the last stage is
    another one; nobody sends or stores it.
    """

    name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    relation: Relation
    where: Literal["layer", "moe", "dense", "first", "last"] = "layer"
    buffer: bool = False
    copy: bool = False

    @property
    def expert(self) -> bool:
        return "{expert}" in self.name


@dataclass(frozen=True)
class Family:
    """What config.json decides. model: keyword arguments of Megatron's TransformerConfig;
    gpt: those of its GPTModel.
    """

    model: dict[str, Any]
    gpt: dict[str, Any]
    entries: tuple[Entry, ...]


class WeightMap:
    """The map of one model: a family's table with the sizes of one
    config.json filled in. Raises UserError for what is not supported.
    """

    def __init__(self, hf_config: dict[str, Any]) -> None:
        model_type = hf_config.get("model_type", "?")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UserError(
                f"model_type {shown(model_type)} has no weight map; supported: {', '.join(sorted(FAMILIES))}"
            )
        module = importlib.import_module(FAMILIES[model_type])
        hf_config = {**module.DEFAULTS, **hf_config}
        try:
            if sentence := _wrong_kind(hf_config) or module.refuse(hf_config):
                raise UserError(sentence)
            family: Family = module.family(hf_config)
        except KeyError as error:
            raise UserError(
                f"model.path: config.json of a {model_type} has no {error}; copy the checkpoint's config.json again"
            ) from None
        self.hf_config = hf_config
        self.vocab_size: int = hf_config["vocab_size"]
        self.model = family.model
        self.gpt = family.gpt
        self.entries = family.entries
        self.num_layers: int = family.model["num_layers"]
        self.num_experts: int = family.model.get("num_moe_experts") or 0
        self.top_k: int = family.model.get("moe_router_topk", 0) if self.num_experts else 0
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise UserError(
                f"model.path: config.json has num_experts_per_tok {self.top_k}, which is none of 1 to its "
                f"{self.num_experts} experts; copy the checkpoint's again"
            )
        self.moe_layers: list[int] = [
            i for i, moe in enumerate(family.model.get("moe_layer_freq", [])) if moe and self.num_experts
        ]

    @cached_property
    def hf_shapes(self) -> dict[str, Shape]:
        """Shape of every Hugging Face tensor."""
        return {name: shape for entry, layer in self.rows() for name, shape in self._tensors(entry, layer)}

    @cached_property
    def hf_float32(self) -> frozenset[str]:
        """Hugging Face tensors that stay float32, in files and on the wire, whatever the dtype of the model."""
        return frozenset(
            name for entry, layer in self.rows() if entry.buffer for name, _ in self._tensors(entry, layer)
        )

    def rows(self) -> Iterator[tuple[Entry, int]]:
        """Every row of the table with its layer, in the order of hf_shapes."""
        yield from ((entry, 0) for entry in self.entries if entry.where == "first")
        for layer in range(self.num_layers):
            yield from ((entry, layer) for entry in self.entries if self._in_layer(entry, layer))
        yield from ((entry, 0) for entry in self.entries if entry.where == "last" and not entry.copy)

    def _tensors(self, entry: Entry, layer: int) -> Iterator[tuple[str, Shape]]:
        for expert in range(self.num_experts) if entry.expert else range(1):
            for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True):
                yield name.format(layer=layer, expert=expert), shape

    def _in_layer(self, entry: Entry, layer: int) -> bool:
        return entry.where == "layer" or entry.where == ("moe" if layer in self.moe_layers else "dense")

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return any(entry.copy for entry in self.entries)

    def padded_vocab(self, tp: int) -> int:
        return -(-self.vocab_size // tp) * tp

    def params(self, layout: Layout, coord: Coord) -> Iterator[Param]:
        """Every parameter that the rank at `coord` holds, in a fixed order."""
        for chunk in range(layout.vpp):
            for entry in self.entries:
                if entry.where == "first" and (coord.pp or chunk):
                    continue
                if entry.where == "last" and (coord.pp, chunk) != (layout.pp - 1, layout.vpp - 1):
                    continue
                if entry.copy and layout.pp == 1:
                    continue
                if entry.where in ("first", "last"):
                    yield from self.params_of(entry, layout, coord, chunk, 0, 0)
                    continue
                for local, layer in enumerate(layout.stage_layers(self.num_layers, coord.pp, chunk)):
                    if self._in_layer(entry, layer):
                        yield from self.params_of(entry, layout, coord, chunk, local, layer)

    def layer_params(self, layout: Layout, coord: Coord, layer: int) -> Iterator[Param]:
        """What the rank at `coord` would hold of one layer, alone in its model chunk."""
        for entry in self.entries:
            if entry.where not in ("first", "last") and self._in_layer(entry, layer):
                yield from self.params_of(entry, layout, coord, layer=layer)

    def params_of(
        self, entry: Entry, layout: Layout, coord: Coord, chunk: int = 0, local: int = 0, layer: int = 0
    ) -> Iterator[Param]:
        """One row of the table. local: the number of the layer in its model chunk."""
        each = self.num_experts // layout.ep if entry.expert else 1
        rank = Rank(layout.etp, coord.etp) if entry.expert else Rank(layout.tp, coord.tp)
        split = not isinstance(entry.relation, Replicated)
        copies = [coord.edp] if entry.expert else [coord.dp, coord.cp]
        if not split:
            copies.append(rank.index)
        copies.append(int(entry.copy))
        for e in range(each):
            hf_names = tuple(name.format(layer=layer, expert=coord.ep * each + e) for name in entry.hf_names)
            shard = entry.relation(hf_names, entry.hf_shapes, rank)
            name = entry.name.format(layer=local, expert=e)
            yield Param(chunk, name, shard.shape, shard.pieces, sum(copies), entry.expert, split, entry.buffer)


def load_hf_config(path: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder, or of the one inside a Megatron checkpoint."""
    file = hf_files(path) / "config.json"
    if not file.is_file():
        raise UserError(f"model.path {str(path)!r} has no config.json; give a Hugging Face checkpoint folder")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{str(file)!r} is not a JSON object; copy the checkpoint again") from None
