"""Writes docs/api.md, the public functions with their shapes, from the docstrings: `python tools/api_docs.py`,
or with --check fails where the file is not current. Reads the source; imports none of it.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.generated import write_or_check  # noqa: E402

WIDTH = 118
HEAD = """# Public functions

Made from the docstrings by `python tools/api_docs.py`; do not edit. What a script of yours would call: names that stay,
with the shapes of tensors, units and errors. A class shows its fields and documented methods. Keys of a configuration:
[config.md](config.md).

Shape letters: T tokens of a pack, R of them unmasked, n responses, L MoE layers, K experts a token, E experts.
"""
# Sections of the page: title, what it is for, and files below megarl/ with the public names to show (all, if none).
SECTIONS: tuple[tuple[str, str, dict[str, tuple[str, ...]]], ...] = (
    ("Configuration", "Imported from `megarl.config`.", {"config/load.py": ("load_config", "dump_config")}),
    (
        "Objective",
        "All can be imported from `megarl.objective`, and so can `presets`. [objective.md](objective.md)",
        {
            "objective/loss.py": (),
            "objective/advantage.py": ("advantages", "gae", "informative", "overlong_penalty"),
            "objective/aggregate.py": ("denominators", "Segments"),
            "objective/metrics.py": ("merge", "finish", "mismatch_metrics", "staleness_metrics"),
            "objective/presets.py": ("resolve_objective",),
            "objective/tokens.py": ("Tokens", "Factor"),
        },
    ),
    (
        "Routing replay",
        "[routing.md](routing.md)",
        {"replay/routes.py": (), "replay/context.py": ("replay_schedule", "Replay", "Recorded")},
    ),
    (
        "Training engine",
        "Needs an initialised process group, or starts one of a single rank.",
        {
            "engine/build.py": ("build_engine",),
            "engine/step.py": ("Engine",),
            "engine/batch.py": ("make_packs", "assign"),
        },
    ),
    (
        "Weights",
        "One table a family, and what follows from it. [families.md](families.md), [weights.md](weights.md)",
        {
            "weights/map/weight_map.py": ("WeightMap", "Family", "Param", "load_hf_config"),
            "weights/map/layout.py": ("Layout",),
            "weights/reshard/plan.py": ("make_plan",),
        },
    ),
    (
        "Rollouts, rewards, loggers",
        "",
        {
            "rollout/response.py": ("Response",),
            "rollout/client.py": ("RolloutClient",),
            "reward/__init__.py": ("get_reward",),
            "observe/loggers.py": ("Logger", "find_logger"),
        },
    ),
)
Definition = ast.FunctionDef | ast.ClassDef


def main(argv: list[str]) -> int:
    return write_or_check("api.md", render(), "api_docs.py", argv)


def render() -> str:
    parts = [HEAD]
    for title, purpose, files in SECTIONS:
        parts.append(f"\n## {title}\n")
        if purpose:
            parts.append(f"\n{purpose}\n")
        for name, wanted in files.items():
            module = "megarl." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for node in public(ROOT / "megarl" / name, wanted):
                parts.append(f"\n### {module}.{node.name}\n\n```text\n{described(node)}\n```\n")
    return "".join(parts)


def public(file: Path, wanted: tuple[str, ...]) -> Iterator[Definition]:
    """The definitions of a file by those names, in that order; if none are named, all that are public."""
    definitions = {
        node.name: node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, Definition)
    }
    for name in wanted or [name for name in definitions if not name.startswith("_")]:
        if name not in definitions:
            raise SystemExit(f"{file.relative_to(ROOT)} has no {name}; mend SECTIONS in tools/api_docs.py")
        yield definitions[name]


def described(node: Definition) -> str:
    """Signature and docstring; of a class its fields and its documented methods as well."""
    doc = textwrap.indent(ast.get_docstring(node) or "", "    ")
    if isinstance(node, ast.FunctionDef):
        return f"{signature(node)}\n{doc}".rstrip()
    lines = [f"class {node.name}", doc]
    fields = [f"    {ast.unparse(item)}" for item in node.body if isinstance(item, ast.AnnAssign)]
    lines += ["", *fields] if fields else []
    for item in node.body:
        shown = isinstance(item, ast.FunctionDef) and not item.name.startswith("_") and ast.get_docstring(item)
        if isinstance(item, ast.FunctionDef) and (shown or item.name == "__init__"):
            lines += ["", textwrap.indent(described(item), "    ")]
    return "\n".join(line for i, line in enumerate(lines) if line or i > 1).rstrip()


def signature(node: ast.FunctionDef) -> str:
    """On one line where it fits, else broken between arguments. Decorators are shown."""
    marks = [f"@{ast.unparse(mark)}\n" for mark in node.decorator_list]
    joined = ast.unparse(node.args).removeprefix("self, ").removeprefix("self")
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({joined}){result}"
    if len(line) > WIDTH:
        glued = joined.replace(": ", ":\0").replace(" | ", "\0|\0")  # breaks between arguments alone
        broken = textwrap.fill(glued, WIDTH - 4, break_long_words=False).replace("\0", " ")
        line = f"{node.name}(\n{textwrap.indent(broken, '    ')}\n){result}"
    return "".join(marks) + line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
