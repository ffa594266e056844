"""Prompts of an image and a text: decoded, resized and normalised by DALI, the tokens beside them. JPEG and PNG.

Rows {"image": path, "messages" | "prompt": ..., "answer": ...}; a path is relative to the file it stands in. The model
families of this release read text alone: this is the data path, for a model that takes pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarl.data.loader import AHEAD, import_dali
from megarl.data.prompts import OnBadLine, Prompt, load_prompts
from megarl.errors import UserError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pictures, in [0, 1]


@dataclass(frozen=True)
class ImagePrompt:
    prompt: Prompt
    image: Path


def load_image_prompts(path: Path, tokenizer: Any, *, max_tokens: int, on_bad_line: OnBadLine) -> list[ImagePrompt]:
    """Raises UserError, naming file and line, as load_prompts does, and where a picture does not exist."""
    prompts, _ = load_prompts(path, tokenizer, max_tokens=max_tokens, on_bad_line=on_bad_line)
    lines = path.read_text().splitlines()
    found = []
    for prompt in prompts:
        image = json.loads(lines[prompt.line - 1]).get("image")
        if not isinstance(image, str) or not (path.parent / image).is_file():
            raise UserError(f"{path} line {prompt.line}: key 'image' is {image!r}; give the path of a JPEG or PNG")
        found.append(ImagePrompt(prompt, path.parent / image))
    return found


def image_batches(
    paths: Sequence[Path],
    *,
    batch: int,
    size: int,
    device: torch.device,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Iterator[Tensor]:
    """float32 [batch, 3, size, size] on `device`, in their order; the
    last one may be smaller. On a GPU the decoder runs there.
    """
    dali = import_dali()
    gpu = device.type == "cuda"
    groups = iter([paths[i : i + batch] for i in range(0, len(paths), batch)])

    def source() -> list[np.ndarray]:
        return [np.fromfile(path, dtype=np.uint8) for path in next(groups)]

    pipe = dali.Pipeline(
        batch_size=batch, num_threads=1, device_id=device.index if gpu else None, prefetch_queue_depth=AHEAD, seed=0
    )
    with pipe:
        raw = dali.fn.external_source(source=source, dtype=dali.types.UINT8, ndim=1, batch=True)
        pixels = dali.fn.decoders.image(raw, device="mixed" if gpu else "cpu", output_type=dali.types.RGB)
        pixels = dali.fn.resize(pixels, size=[size, size], interp_type=dali.types.INTERP_CUBIC, antialias=True)
        scaled = dict(
            mean=[255 * m for m in mean], std=[255 * s for s in std], output_layout="CHW", dtype=dali.types.FLOAT
        )
        pipe.set_outputs(dali.fn.crop_mirror_normalize(pixels, **scaled))
    pipe.build()
    while True:
        try:
            [out] = pipe.run()
        except StopIteration:
            return
        except RuntimeError as error:
            raise UserError(
                f"a picture cannot be decoded ({' '.join(str(error).split())[:200]}); give JPEG or PNG files"
            ) from None
        yield torch.from_dlpack(out.as_tensor()).clone()
