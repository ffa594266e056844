"""Which checkpoints of a run are whole and sound: names, sizes and checksums.

No torch, so that the launcher knows before anything heavy is imported.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config import Config

# folder inside a checkpoint: config.json, tokenizer and the like, so that the checkpoint needs nothing else
HF_FILES = "hf"
STATE = "megarl.json"  # a checkpoint without it is not whole
FILES = "files"  # in it: name of every other file -> [bytes, xxh3 of them]
NAME = re.compile(r"step_(\d+)$")
PARTIAL = re.compile(r"\.step_\d+\.partial$")
READ_BYTES = 2**22
SEEN_WITHIN_S = 10.0  # a network file system may show a new file late


def whole_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    whole = (
        [path for path in folder.glob("step_*") if NAME.match(path.name) and (path / STATE).is_file()]
        if folder.is_dir()
        else []
    )
    return sorted(whole, key=step_of)


def remove_leftovers(folder: Path) -> None:
    """Removes what a save that was cut short left in a run's checkpoints, by its name; nothing else."""
    for path in folder.iterdir() if folder.is_dir() else []:
        if PARTIAL.match(path.name):
            shutil.rmtree(path, ignore_errors=True)


def hf_files(path: str | Path) -> Path:
    """Where config.json and the tokenizer of a model.path lie: a
    Hugging Face folder is that itself, a Megatron checkpoint holds one.
    """
    inside = Path(path) / HF_FILES
    return inside if (inside / "config.json").is_file() else Path(path)


def is_hf_folder(path: str | Path) -> bool:
    """Whether a model.path is a Hugging Face folder, which vLLM reads by itself, and no Megatron checkpoint."""
    return hf_files(path) == Path(path)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What megarl.json holds. UserError names a file that cannot be read."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("it holds no object")
        return state
    except (OSError, ValueError) as error:
        raise UserError(f"{str(checkpoint / STATE)!r} cannot be read ({error}); the checkpoint is damaged") from None


def size_of(checkpoint: Path) -> int:
    """Bytes of its files, as megarl.json has them: no file is looked at. 0 of one that does not say."""
    try:
        return sum(int(size) for size, _ in state_of(checkpoint).get(FILES, {}).values())
    except (UserError, AttributeError, TypeError, ValueError):  # who loads it says what is wrong with it
        return 0


def seal(path: Path) -> list[int | str]:
    """[bytes, checksum] of a file, as FILES holds them."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]


def damage(checkpoint: Path, *, contents: bool = False, share: tuple[int, int] = (0, 1)) -> str | None:
    """The first file of a checkpoint that is not what was written, in words; None where nothing is wrong.

    contents: read them all and compare checksums, not only sizes. share (i, n): look at every n-th file from the i-th,
    so that n ranks look at all of them. A checkpoint of a release that wrote no checksums is taken as it is.
    """
    try:
        files: dict[str, list[int | str]] = state_of(checkpoint).get(FILES, {})
    except UserError:
        return f"{STATE} cannot be read"
    for name, (size, checksum) in sorted(files.items())[share[0] :: share[1]]:
        path = checkpoint / name
        try:
            present = path.stat().st_size
            if present != size:
                return f"{name} has {present} bytes of {size}"
            if contents and seal(path)[1] != checksum:
                return f"the checksum of {name} is another"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint whose files have their sizes; None where there is none."""
    return next((path for path in reversed(whole_checkpoints(folder)) if not damage(path)), None)


def no_sound(last: Path, fault: str) -> str:
    """What to say where the newest checkpoint is damaged and none before it is whole."""
    return (
        f"checkpoint {str(last)!r} is damaged ({fault}), and there is no whole one before it; copy it again, or remove "
        f"{str(last.parent)!r} to begin anew"
    )


def how_to_go_on(config: Config) -> str:
    """What to say of a run that a signal ended."""
    last = newest(Path(config.run.dir) / "checkpoints")
    return f"the same command goes on after step {step_of(last)}" if last else "nothing is saved yet"


def finished(config: Config) -> str | None:
    """One line if run.dir already holds the run's last step, so that nothing is left to start."""
    last = newest(Path(config.run.dir) / "checkpoints")
    if last is None or step_of(last) < config.train.steps:
        return None
    step = f"step {step_of(last)} of {config.train.steps}"
    return f"run.dir {config.run.dir!r} is complete ({step}); raise train.steps to go on, or give another run.dir"
