"""What the pages point to is there: links, anchors, files; and the project speaks of itself alone."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
FILES = TRACKED or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]  # an unpacked archive
PAGES = [name for name in FILES if name.endswith(".md")]
SOURCES = [name for name in FILES if name.endswith((".py", ".sh", ".md", ".yaml", ".toml"))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    lines = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip() for line in lines if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_are_there(page: str) -> None:
    here = ROOT / page
    for match in LINK.finditer(CODE.sub("", here.read_text())):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (here.parent / path).resolve() if path else here
        assert file.exists(), f"{page}: {target} is not there"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page}: {target}: no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_code_marks_are_there(page: str) -> None:
    """`tests/unit/test_x.py`, or short for a file under megarl/: `engine/model.py`, `loop/`."""
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/([\w-]+\.(py|sh|md|yaml|svg))?", span) and not span.startswith("runs/"):
            places = [ROOT / span, ROOT / "megarl" / span, (ROOT / page).parent / span]
            inside_a_run = re.match(r"(checkpoints|rollouts|logs|tensorboard|wandb|hf|step_N|run\.dir)/", span)
            assert inside_a_run or any(place.exists() for place in places), f"{page}: `{span}` is not there"


def test_pages_named_in_sources_are_there() -> None:
    for name in SOURCES:
        for page in re.findall(r"\b(?:docs|spec)/[\w-]+\.md\b", (ROOT / name).read_text()):
            assert (ROOT / page).is_file() or name == "tests/unit/test_docs.py", f"{name}: {page} is not there"


def test_a_commit_is_checked_by_what_ci_checks() -> None:
    """.pre-commit-config.yaml has every quick check of tools/test.sh, with the same commands."""
    script = (ROOT / "tools/test.sh").read_text()
    checks = re.findall(r"^\.venv/bin/((?:ruff|mypy|python tools/).*?)(?: \.)?$", script, re.MULTILINE)
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    entries = " ".join(hook["entry"] for hook in hooks)
    assert len(checks) >= 6
    for check in checks:
        assert check.replace(" --check --quiet", "") in entries, f"no pre-commit hook runs {check}"


def test_nothing_is_said_about_one_machine() -> None:
    """No file names the place of this checkout, or a home."""
    for name in SOURCES:
        text = (ROOT / name).read_text()
        for place in (ROOT, Path.home()):
            assert f"{place}/" not in text, f"{name}: {place} is of one machine, not of the project"
