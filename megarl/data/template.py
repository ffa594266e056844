"""The chat template of a model.path, found and compiled as transformers does (chat_template_utils.py), without it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from megarl.checkpoints import hf_files
from megarl.data.tokenizer import settings
from megarl.errors import UserError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

USED = ("default", "tool_use")  # of several, the latter for rows with tools


def chat_templates(path: str) -> dict[str, tuple[Path, str]]:
    """Name -> (file, text). Files of their own come before tokenizer_config.json. Raises UserError where one cannot be
    read.
    """
    folder = hf_files(path)
    named = {file.stem: file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    files = {
        name: file for name, file in {"default": folder / "chat_template.jinja", **named}.items() if file.is_file()
    }
    if files:
        return {name: (file, _text(file)) for name, file in files.items()}
    file, given = folder / "tokenizer_config.json", settings(folder).get("chat_template")
    try:
        texts = {each["name"]: each["template"] for each in given} if isinstance(given, list) else given or {}
    except (KeyError, TypeError):
        texts = {"": None}
    texts = {"default": texts} if isinstance(texts, str) else texts
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise UserError(f"{str(file)!r}: chat_template is no text, nor a list of {{name, template}}; mend it")
    return {name: (file, text) for name, text in texts.items()}


def template_fault(path: str) -> str | None:
    """One line where a template that would be used does not compile."""
    from jinja2 import TemplateSyntaxError

    templates = chat_templates(path)
    if templates and not any(name in templates for name in USED):
        return f"of its chat templates, {', '.join(templates)}, none is 'default', the one to use; add it"
    for name, (file, text) in templates.items():
        if name not in USED:
            continue
        try:
            _environment().compile(text)
        except TemplateSyntaxError as error:
            line = text.splitlines()[error.lineno - 1 : error.lineno]
            shown = f", {line[0].strip()[:80]!r}" if line else ""
            why = f"line {error.lineno}{shown}: {error.message}"
        except Exception as error:  # of Python's compiler
            why = " ".join(str(error).split())[:160]
        else:
            continue
        return f"chat template {name!r} of {str(file)!r} does not compile ({why}); mend it"
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(file)!r} is not in UTF-8 (byte {error.start}); save it in that encoding") from None


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what the assistant says."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
