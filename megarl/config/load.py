"""A configuration from a YAML file and `key=value` overrides, and back. Unknown keys are refused with the nearest
valid one.
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from megarl.config.tree import Config, walk
from megarl.errors import UserError, shown
from megarl.folders import write_whole
from megarl.hints import meant
from megarl.objective.presets import resolve_objective

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MERGE = "tag:yaml.org,2002:merge"  # of <<, which may stand twice


class _GivenTwice(yaml.YAMLError):
    """A key that stands twice in one mapping, on the lines `first` and `again`, counted from 1."""

    def __init__(self, key: str, first: int, again: int) -> None:
        super().__init__(key)
        self.key, self.first, self.again = key, first, again


class _Loader(yaml.SafeLoader):
    """Of two equal keys PyYAML would keep the last in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise _GivenTwice(key.value, lines[name], line)
            lines[name] = line
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what _Loader would not take for a text."""


EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
for _side in (_Loader, _Dumper):  # PyYAML takes 1e-5, which has no dot, for a text
    _side.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (ValueError, RecursionError) as error:  # a date such as 2026-13-01, brackets thousands deep
        raise yaml.YAMLError(str(error)) from None


def load_config(path: str | Path | None, overrides: list[str] = []) -> Config:
    """Reads YAML, applies `key.path=value` overrides (values are YAML), validates.

    Raises UserError, one line, for a missing file, a bad override, an
    unknown key (with the nearest valid one) or a bad value.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise UserError(
                f"config file {str(path)!r} does not exist; give the path of a YAML file, e.g. examples/quickstart.yaml"
            )
        try:
            tree = _yaml(Path(path).read_text(encoding="utf-8")) or {}
        except UnicodeDecodeError as error:
            raise UserError(
                f"config file {str(path)!r} is not in UTF-8 (byte {error.start}); save it in that encoding"
            ) from None
        except _GivenTwice as error:
            raise UserError(
                f"config file {str(path)!r}: key {error.key!r} is given on line {error.first} and again on line "
                f"{error.again}; leave one out"
            ) from None
        except yaml.YAMLError as error:
            raise UserError(f"config file {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise UserError(
                f"config file {str(path)!r} holds a {type(tree).__name__}; it must hold sections such as 'train:'"
            )
    tree = {
        key: {} if value is None else value for key, value in tree.items()
    }  # a section with all its keys commented out
    for item in overrides:
        key, sep, value = item.partition("=")
        if not sep or not key:
            raise UserError(f"override {item!r} is not key=value, e.g. train.lr=1e-5")
        _set(tree, key.split("."), _value(item, key, value), item)
    if "objective" in tree:
        tree["objective"] = resolve_objective(tree["objective"])
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_first_error(error)) from None


def _value(item: str, key: str, text: str) -> Any:
    """YAML; but where a key takes a text, what YAML does not read as one is meant as it stands: run.dir=2026-11-28."""
    try:
        value = _yaml(text) if text else ""
    except yaml.YAMLError as error:
        if _takes_text(key):
            return text
        if isinstance(error, _GivenTwice):
            raise UserError(f"override {item!r}: key {error.key!r} is given twice; leave one out") from None
        raise UserError(f"override {item!r}: the value is not YAML; quote it, e.g. '{key}=\"a: b\"'") from None
    return text if _takes_text(key) and not isinstance(value, str | None) else value


def _takes_text(key: str) -> bool:
    return any(name == key and field.annotation in (str, str | None) for name, field, _ in walk())


def _set(tree: dict[str, Any], keys: list[str], value: Any, item: str) -> None:
    if keys[0] == "objective" and len(keys) > 1 and isinstance(tree.get("objective"), str):
        tree["objective"] = {"preset": tree["objective"]}
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {item!r}: {key!r} is a value, not a section")
    tree[keys[-1]] = value


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    names = [str(part) for part in first["loc"]]
    key = ".".join(names)
    if first["type"] == "extra_forbidden":
        section, _, name = names[-1].partition(".")
        if name and len(names) == 1 and section in _sections():  # only an override is split at its dots
            return f"config key {key!r}: in a file a dot makes no section; write {section}: {{{name}: ...}}"
        inside = list(map(str, first["input"])) if isinstance(first["input"], dict) else []
        return f"unknown config key {key!r}; {meant(key, inside, _sections())}"
    return f"config key {key!r} = {shown(first['input'])}: {_why(first, names)}"


def _why(first: ErrorDetails, names: list[str]) -> str:
    """What is wrong with a value and, where pydantic says it in words of Python, how to mend it."""
    if first["type"] == "model_type":
        example = next(iter(_sections()[names[0]]))
        return f"this is a section; give its keys, e.g. {names[0]}: {{{example}: ...}}"
    why = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "string_type" and isinstance(first["input"], bool | int | float | date):
        return f"{why}; put it in quotes"
    if first["type"] in ("int_type", "float_type", "bool_type") and _quoted(first["input"]):
        return f"{why}; leave out the quotes"
    return why


def _quoted(value: Any) -> bool:
    """Whether it is a text that YAML would not take for one."""
    try:
        return isinstance(value, str) and not isinstance(_yaml(value), str)
    except yaml.YAMLError:
        return False


def _sections() -> dict[str, list[str]]:
    return {name: list(field.annotation.model_fields) for name, field in Config.model_fields.items()}  # type: ignore[union-attr]


def dump_config(config: Config) -> str:
    """The resolved tree as YAML: what a run directory's config.yaml holds; loading it gives the same tree."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def keep_config(config: Config, run_dir: Path, resumed: int) -> None:
    """run_dir/config.yaml, and the same as config.step_N.yaml, N the step that this start goes on from (0 for a new
    run): what every step ran under stays known. Files of steps that are now done again are removed, as their rows are.
    """
    for path in run_dir.glob("config.step_*.yaml"):
        number = path.name.removeprefix("config.step_").removesuffix(".yaml")
        if number.isdecimal() and int(number) > resumed:
            path.unlink()
    for name in ("config.yaml", f"config.step_{resumed}.yaml"):
        write_whole(run_dir / name, dump_config(config))
