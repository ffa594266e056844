"""Pages of docs/ that a tool makes: written, or with --check compared with what stands there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_or_check(page: str, text: str, tool: str, argv: Sequence[str]) -> int:
    """The exit status. page: its file in docs/; tool: the script below tools/ that made `text`."""
    target = ROOT / "docs" / page
    if list(argv) != ["--check"]:
        target.write_text(text, encoding="utf-8")
        return 0
    is_current = target.is_file() and target.read_text(encoding="utf-8") == text
    print(f"docs/{page} is {'current' if is_current else f'not current; run: python tools/{tool}'}")
    return 0 if is_current else 1
