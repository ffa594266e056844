"""Writes docs/config.md from the typed tree: `python tools/config_docs.py`,
or with --check fails where the file is not current.
"""

from __future__ import annotations

import sys
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megarl.config import Config  # noqa: E402
from megarl.objective.choices import CHOICES  # noqa: E402
from megarl.objective.presets import ObjectiveConfig, presets  # noqa: E402
from tools.generated import write_or_check  # noqa: E402

HEAD = """# Configuration

Made from megarl/config/ by `python tools/config_docs.py`; do not edit. A run reads one YAML file and `key=value` after it:

    megarl run examples/quickstart.yaml train.lr=1e-4 objective.is_cap=10

Unknown keys are refused, and values of another type: `true` is no number, `1` no truth value, `"3"` in quotes a text. One file may serve all commands; a `key=value` that its command would ignore is refused. The resolved tree is written to config.yaml in the run's folder.
"""


def main(argv: list[str]) -> int:
    return write_or_check("config.md", render(), "config_docs.py", argv)


def render() -> str:
    parts = [HEAD]
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, BaseModel)
        parts.append(f"\n## {name}\n")
        doc = field.description or own_docstring(section)
        if section is ObjectiveConfig:
            doc += (
                f" Presets: {', '.join(f'`{preset}`' for preset in presets)}. The defaults below are those of `minirl`."
            )
        if doc:
            parts.append(f"\n{doc}\n")
        parts.append("\n| key | type | default | meaning |\n|---|---|---|---|\n")
        parts += [row(f"{name}.{key}", inner) for key, inner in section.model_fields.items()]
    return "".join(parts)


def own_docstring(section: type[BaseModel]) -> str:
    return " ".join((section.__dict__.get("__doc__") or "").split())


def row(key: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    shown = {"": "empty", "None": "unset"}.get(
        str(default), f"`{str(default).lower() if isinstance(default, bool) else default}`"
    )
    meaning = (field.description or "").replace("|", "\\|")
    names = CHOICES.get(key.removeprefix("objective.")) if key.startswith("objective.") else None
    kind = ", ".join(f"`{name}`" for name in [*names, "module.function"]) if names else type_name(field.annotation)
    return f"| `{key}` | {kind} | {shown} | {meaning} |\n"


def type_name(annotation: Any) -> str:
    """A type as a reader of YAML would say it."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if typing.get_origin(annotation) is list:
        return f"list of {type_name(arguments[0])}"
    if typing.get_origin(annotation) is dict:
        return f"{type_name(arguments[0])}: {type_name(arguments[1])}"
    if arguments:
        return ", ".join(type_name(argument) for argument in arguments if argument is not type(None))
    return {"int": "integer", "float": "number", "str": "text", "bool": "true, false"}.get(
        annotation.__name__, annotation.__name__
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
