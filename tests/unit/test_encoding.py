"""Text files are UTF-8 whatever the locale says: no open, read_text or write_text of ours leaves it to choose."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ("os", "gzip")  # whose open is of bytes
FILES = [
    path for folder in ("megarl", "tools", "checkpoints_conversion") for path in sorted((ROOT / folder).rglob("*.py"))
]


def by_locale(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that open a text file without naming an encoding."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function, keys = call.func, {key.arg: key.value for key in call.keywords}
        method = isinstance(function, ast.Attribute)
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        place = {"read_text": 0, "write_text": 1}.get(name)
        if place is not None and method and len(call.args) <= place and "encoding" not in keys:
            yield call
        if name not in ("open", "fdopen") or "encoding" in keys:
            continue
        if name == "open" and method and getattr(function.value, "id", "") in OTHERS:
            continue
        at = 0 if name == "open" and method else 1
        mode = call.args[at] if len(call.args) > at else keys.get("mode", ast.Constant("r"))
        if isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) <= set("rwaxt+"):
            yield call


def test_the_finder_finds() -> None:
    text = (
        "open(p)\nopen(p, 'a')\np.open()\nf.read_text()\nf.write_text(t)\nos.fdopen(1, 'w')\nPath(x).open(mode='w')\n"
    )
    fine = "open(p, 'rb')\nos.open(p, 1)\ngzip.open(p)\nf.read_text('utf-8')\nf.write_text(t, 'utf-8')"
    assert len(list(by_locale(ast.parse(text)))) == 7 and not list(
        by_locale(ast.parse(fine + "\ntar.open(x, 'w:gz')\n"))
    )


def test_fault_23_no_file_is_read_or_written_by_the_locale() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno} {ast.unparse(call)}"
        for path in FILES
        for call in by_locale(ast.parse(path.read_text("utf-8")))
    ]
    assert found == []


def test_fault_23_samples_are_utf8_under_another_locale(tmp_path: Path) -> None:
    code = (
        "from megarl.observe.samples import Sample, write_samples; "
        "sample = Sample(chr(0x2192), [1], chr(0xe9), 1.0, 'stop', 0, [0.0], 0); "
        f"write_samples({str(tmp_path)!r}, 1, [sample], lambda tokens: chr(0xbd))"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = "".join(path.read_text("utf-8") for path in (tmp_path / "rollouts").iterdir())
    assert "\u2192" in written or "\\u2192" in written
