"""What a vLLM log says about why its server ended."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TAIL_LINES = 15
LONGEST = 400  # characters of a cause
_NOISE = re.compile(
    r"nanobind|^ - leaked|^ - \.\.\.|resource_tracker|warnings\.warn|^\s*$"
)  # what a dying vLLM prints last
_LINE = re.compile(r"((?:\([^()]*pid=\d+\) )*)(?:([A-Z]+) \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?(.*)")
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception)(?:: .+)?$")
_FATAL = re.compile(r"EngineCore (?:failed|encountered)|WorkerProc (?:failed|hit)")
# exceptions that only say that another process failed
_ECHO = re.compile(r"EngineDeadError|See root cause above|background process|CancelledError|Connection closed by peer")
_NO_MESSAGE_LINE = re.compile(r"\s*$|Traceback |During handling|The above exception|[A-Z]+: |Process \w+:")


@dataclass(frozen=True)
class _Line:
    source: str  # the process and the level, alike for the lines of one message
    text: str


def log_tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines that say something, read from the end of the file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64 * 1024))
        return "\n".join(
            [line for line in file.read().decode(errors="replace").splitlines() if not _NOISE.search(line)][-lines:]
        )


def cause(path: Path) -> str | None:
    """The exception that ended the server, in one line; None where the log has none.

    The last one of the traceback under the first report of a process that died, and not what other processes say of it;
    without such a report, the last one of the log. vLLM's warnings are no cause. An exception without a message comes
    with the code that raised it.
    """
    lines = [
        line
        for raw in path.read_text(errors="replace", encoding="utf-8").splitlines()
        if (line := _parse(raw)) is not None
    ]
    fatal = next((i for i, line in enumerate(lines) if _FATAL.match(line.text)), None)
    if fatal is not None:
        end = next((i for i in range(fatal, len(lines)) if lines[i].source != lines[fatal].source), len(lines))
        if exception := _last_exception(lines[fatal:end]):
            return exception
    return _last_exception(lines)


def _parse(raw: str) -> _Line | None:
    match = _LINE.match(raw)
    assert match is not None
    process, level, text = match.groups()
    if level in ("INFO", "WARNING", "DEBUG") or (process and not level):
        return None
    return _Line(f"{process}{level or ''}", text)


def _last_exception(lines: list[_Line]) -> str | None:
    exceptions = [i for i, line in enumerate(lines) if _EXCEPTION.match(line.text)]
    first_hand = [i for i in exceptions if not _ECHO.search(lines[i].text)]
    if not exceptions:
        return next((line.text for line in reversed(lines) if ": error: " in line.text), None)
    last = (first_hand or exceptions)[-1]
    message = lines[last].text if ": " in lines[last].text else f"{lines[last].text}, {_code(lines[:last])}"
    for line in lines[last + 1 : last + 4]:
        if line.source != lines[last].source or _NO_MESSAGE_LINE.match(line.text):
            break
        message += " " + line.text.strip()
    return message[:LONGEST]


def _code(before: list[_Line]) -> str:
    """The line of code at the end of a traceback, and where it stands."""
    frames = [i for i, line in enumerate(before) if line.text.startswith('  File "')]
    if not frames:
        return "of which the log says no more"
    where = re.match(r'  File ".*?([^/"]+)", line (\d+)', before[frames[-1]].text)
    code = before[frames[-1] + 1].text.strip() if frames[-1] + 1 < len(before) else ""
    return f"{code} ({where[1]}:{where[2]})" if where else code
