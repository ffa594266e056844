"""Which checkpoints of a run are whole: a matter of names, so that the
launcher knows before anything heavy is imported.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megarl.config import Config

# folder inside a checkpoint: config.json, tokenizer and the like, so that the checkpoint needs nothing else
HF_FILES = "hf"
STATE = "megarl.json"  # a checkpoint without it is not whole
NAME = re.compile(r"step_(\d+)$")


def whole_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = (
        [path for path in folder.glob("step_*") if NAME.match(path.name) and (path / STATE).is_file()]
        if folder.is_dir()
        else []
    )
    return sorted(found, key=step_of)


def hf_files(path: str | Path) -> Path:
    """Where config.json and the tokenizer of a model.path lie: a
    Hugging Face folder is that itself, a Megatron checkpoint holds one.
    """
    inside = Path(path) / HF_FILES
    return inside if (inside / "config.json").is_file() else Path(path)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def finished(config: Config) -> str | None:
    """One line if run.dir already holds the run's last step, so that nothing is left to start."""
    whole = whole_checkpoints(Path(config.run.dir) / "checkpoints")
    if not whole or step_of(whole[-1]) < config.train.steps:
        return None
    step = f"step {step_of(whole[-1])} of {config.train.steps}"
    return f"run.dir {config.run.dir!r} is complete ({step}); raise train.steps to go on, or give another run.dir"
