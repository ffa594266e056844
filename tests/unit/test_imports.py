"""Who may import whom. Read from the source, so imports inside functions and dotted names in strings count too."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megarl"

# Bottom first: a room imports rooms of earlier lines only, so there are no cycles. A room is a folder of megarl/, or a
# file beside them; docs/architecture.md says what each is for.
ORDER = """
    errors hints announce door
    addresses dotted checkpoints folders
    objective replay
    config
    weights
    weights.map weights.transport
    weights.files weights.reshard
    launch rollout
    reward
    engine data
    observe server
    report refusals
    estimate
    convert loop
    train simulate
    commands
    cli
    __main__
"""
LEVEL = {room: level for level, line in enumerate(ORDER.strip().splitlines()) for room in line.split()}
ALONE = {  # rooms that stand on torch, and may use nothing of ours but these
    "objective": {"errors", "dotted"},
    "replay": {"errors"},
    "weights": {"errors", "checkpoints", "weights"},
}
ONLY_IN = {"vllm": "megarl.server", "megatron": "megarl.engine"}  # third party -> the one room that may import it


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    """megarl.weights.map.relations -> weights.map; megarl.loop.learn -> loop; megarl.train -> train."""
    parts = module.split(".")[1:]
    if len(parts) > 1 and parts[0] == "weights" and (PACKAGE / "weights" / parts[1]).is_dir():
        return ".".join(parts[:2])
    return parts[0]


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that the source imports, whenever and however: `import`, `from`, a string that is a
    dotted name below megarl, the argument of import_module.

    Left out: what serves type checkers alone, and the block of a script's own start (if __name__ == "__main__").
    """
    tree = ast.parse(source)
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and re.search("TYPE_CHECKING|__name__", ast.unparse(node.test)):
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))  # a docstring
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"megarl(\.\w+)+(:\w+)?", node.value):
                yield node.lineno, node.value.replace(":", ".")
        elif isinstance(node, ast.Call) and re.search(r"(import_module|__import__)$", ast.unparse(node.func)):
            yield from ((node.lineno, str(first.value)) for first in node.args[:1] if isinstance(first, ast.Constant))


def imported() -> Iterator[tuple[str, int, str]]:
    """(module, line, what it imports) of the whole package."""
    for module, file in FILES.items():
        for line, name in imports(file.read_text(), module, file.name == "__init__.py"):
            yield module, line, name


def ours() -> Iterator[tuple[str, int, str]]:
    """The same of megarl's own modules, each as the module that is meant."""
    for module, line, name in imported():
        if name.split(".")[0] == "megarl":
            while name not in FILES:
                name = name.rpartition(".")[0]
            if name != "megarl":
                yield module, line, name


def test_every_room_has_a_place_in_the_order() -> None:
    assert {room_of(module) for module in FILES if module != "megarl"} == set(LEVEL)


def test_every_room_is_on_the_page() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for room in LEVEL:
        place = PACKAGE / room.replace(".", "/")
        name = f"{room.replace('.', '/')}/" if place.is_dir() else f"{room}.py"
        assert f"`{name}`" in page or room == "__main__", f"docs/architecture.md does not say what {name} is for"


def test_arrows_point_down_so_there_are_no_cycles() -> None:
    wrong = [
        f"{module}:{line} imports {name}"
        for module, line, name in ours()
        if module != "megarl" and room_of(module) != room_of(name) and LEVEL[room_of(name)] >= LEVEL[room_of(module)]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ALONE)
def test_what_is_pure_stays_pure(room: str) -> None:
    wrong = [
        f"{module}:{line} imports {name}"
        for module, line, name in ours()
        if room_of(module).split(".")[0] == room and room_of(name).split(".")[0] not in {room, *ALONE[room]}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ONLY_IN)
def test_an_engine_is_imported_in_its_room_alone(package: str) -> None:
    found = [(module, line) for module, line, name in imported() if name.split(".")[0] == package]
    assert found, f"nothing imports {package}: the walk does not see it"
    assert not [place for place in found if not place[0].startswith(ONLY_IN[package])]


def test_the_pure_rooms_import_without_megatron_and_vllm() -> None:
    """What the source says, seen in a process."""
    modules = [name for name in FILES if name != "megarl" and room_of(name).split(".")[0] in ALONE]
    code = f"import sys, {', '.join(modules)}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert {"megatron", "vllm", "transformers"}.isdisjoint(run.stdout.split()) and "torch" in run.stdout.split()


def test_the_walk_sees_every_kind_of_import() -> None:
    source = '''
"""megarl.a.docstring"""
from __future__ import annotations
import megarl.b as b
from megarl import c
from . import d
from .e import f
if TYPE_CHECKING:
    import megarl.types
def late():
    from megarl.g import h
    importlib.import_module("vllm.i")
TABLE = {"x": "megarl.j.k:main"}
if __name__ == "__main__":
    import megarl.start
'''
    found = {name for _, name in imports(source, "megarl.room.module")}
    assert found == {
        "__future__.annotations", "megarl.b", "megarl.c", "megarl.room.d", "megarl.room.e.f", "megarl.g.h", "vllm.i",
        "megarl.j.k.main",
    }  # fmt: skip
