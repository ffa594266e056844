"""Which tensors a Hugging Face folder holds, in which files, of which shapes: read from headers, without torch.

Which files count is transformers' rule: model.safetensors alone where it exists, else what the index names. A folder
with a single safetensors file of another name is read too. A checkpoint may hold more than the tensors of its map:
block-FP8 scales, multi-token prediction, computed constants.
"""

from __future__ import annotations

import json
from pathlib import Path

from megarl.errors import UserError
from megarl.weights.files.safetensors_header import Entry, read_header
from megarl.weights.files.shapes import refuse_shape
from megarl.weights.map.weight_map import WeightMap, load_hf_config
from megarl.weights.rect import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE = "_scale_inv"  # of tensor X is X + SCALE, float32, one value a block
HEAD = "lm_head.weight"
COMPUTED = ".rotary_emb.inv_freq"  # older checkpoints store what config.json already says


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index of a sharded checkpoint has it. UserError where it is none."""
    try:
        return dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{str(folder / INDEX)!r} is not an index of safetensors; copy the checkpoint again") from None


class HfIndex:
    """`where` maps tensor names to file names; `block` is the rows and columns of a block of block-FP8, or None."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._headers: dict[str, dict[str, Entry]] = {}
        self.where = self._where()
        quantization = load_hf_config(self.path).get("quantization_config")
        self.block: tuple[int, int] | None = tuple(quantization["weight_block_size"]) if quantization else None

    def _where(self) -> dict[str, str]:
        files = sorted(file.name for file in self.path.glob("*.safetensors"))
        if (self.path / INDEX).is_file() and SINGLE not in files:
            where = read_index(self.path)
            if missing := sorted(set(where.values()) - set(files)):
                raise UserError(
                    f"model.path {str(self.path)!r} lacks {missing[0]}, which its index names; copy the checkpoint "
                    "again"
                )
            return where
        if SINGLE not in files and len(files) != 1:
            has = f"{len(files)} safetensors files but no {INDEX}" if files else "no *.safetensors"
            raise UserError(
                f"model.path {str(self.path)!r} has {has}; save it with safe_serialization, or copy it again"
            )
        file = SINGLE if SINGLE in files else files[0]
        return dict.fromkeys(self.header(file), file)

    def header(self, file: str) -> dict[str, Entry]:
        if file not in self._headers:
            self._headers[file] = read_header(self.path / file)
        return self._headers[file]

    def entry(self, name: str) -> Entry:
        """UserError where no file holds the tensor."""
        if name not in self.where:
            raise UserError(
                f"tensor {name!r} is missing from {str(self.path)!r}; the checkpoint does not match its config.json"
            )
        header = self.header(self.where[name])
        if name not in header:
            raise UserError(
                f"{str(self.path / self.where[name])!r} lacks tensor {name!r}, which the index places there; copy it "
                "again"
            )
        return header[name]

    def scaled(self, name: str) -> bool:
        """Whether it is block-FP8."""
        return self.block is not None and name + SCALE in self.where

    @property
    def files(self) -> list[str]:
        """Names of the files that hold its tensors."""
        return sorted(set(self.where.values()))

    @property
    def left_aside(self) -> str | None:
        """One line where the folder holds an index that is not followed."""
        if self.files != [SINGLE] or not (self.path / INDEX).is_file():
            return None
        return f"{str(self.path)!r}: reads {SINGLE}, as transformers does, and leaves {INDEX} aside"

    def carried(self, weight_map: WeightMap) -> list[str]:
        """Tensors that are not trained but belong to every copy of the checkpoint: its multi-token prediction layers,
        sorted. Reads headers alone.

        UserError where the map and the files differ: a tensor that is missing, unknown, or of another shape.
        """
        for name, shape in weight_map.hf_shapes.items():
            if name in self.where:
                self._check_shape(weight_map, name, shape)
        missing = next((name for name in weight_map.hf_shapes if name not in self.where), None)
        if missing:
            raise UserError(
                f"model.path: tensor {missing!r} is missing from the checkpoint; it does not match its config.json"
            )
        return self._besides(weight_map)

    def _check_shape(self, weight_map: WeightMap, name: str, shape: Shape) -> None:
        stored = self.entry(name).shape
        refuse_shape(str(self.path), name, stored, shape, weight_map, lambda other: other.hf_shapes[name])
        if self.block is not None and self.scaled(name):
            blocks = tuple(-(-n // size) for n, size in zip(shape, self.block, strict=True))
            stored = self.entry(name + SCALE).shape
            refuse_shape(str(self.path), name + SCALE, stored, blocks, weight_map, lambda _: blocks)

    def _besides(self, weight_map: WeightMap) -> list[str]:
        """What the checkpoint holds beside the map. UserError for what config.json does not know."""
        hf_config, layers = weight_map.hf_config, weight_map.num_layers
        extra = int(hf_config.get("num_nextn_predict_layers", hf_config.get("num_mtp_layers", 0)) or 0)
        prefixes = tuple(f"model.layers.{layer}." for layer in range(layers, layers + extra))
        prediction: list[str] = []
        unknown: list[str] = []
        for name in sorted(self.where.keys() - weight_map.hf_shapes.keys()):
            if weight_map.tied and name == HEAD:  # some writers store it beside the embedding that it is
                continue
            if name.endswith(COMPUTED) or (name.endswith(SCALE) and self.scaled(name.removesuffix(SCALE))):
                continue
            (prediction if prefixes and name.startswith(prefixes) else unknown).append(name)
        if unknown:
            raise UserError(
                f"model.path: the checkpoint holds {len(unknown)} tensors that a {hf_config['model_type']} with its "
                f"config.json has not, first {', '.join(map(repr, unknown[:3]))}; use the config.json that belongs to "
                "it"
            )
        return prediction
