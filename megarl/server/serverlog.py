"""What a vLLM log says about why its server ended."""

from __future__ import annotations

import re
from pathlib import Path

TAIL_LINES = 15
_NOISE = re.compile(
    r"nanobind|^ - leaked|^ - \.\.\.|resource_tracker|warnings\.warn|^\s*$"
)  # what a dying vLLM prints last
_ERROR = re.compile(r"(?:^|ERROR .*?\] )((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.MULTILINE)


def log_tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines that say something, read from the end of the file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64 * 1024))
        return "\n".join(
            [line for line in file.read().decode(errors="replace").splitlines() if not _NOISE.search(line)][-lines:]
        )


def first_error(path: Path) -> str | None:
    """The first exception in the log, in one line: vLLM's last one only says that another process failed."""
    found = _ERROR.search(path.read_text(errors="replace"))
    return found.group(1) if found else None
