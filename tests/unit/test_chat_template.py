"""A chat template is compiled before any process starts, and what transformers takes is not refused."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from megarl import refusals
from megarl.config import ModelConfig, load_config
from megarl.data.template import chat_templates, template_fault
from megarl.data.tokenizer import load_tokenizer
from megarl.errors import UserError
from tools.tiny_model import make_tokenizer

BAD, GOOD = "{% for m in messages %}\n  {{ m.content }\n{% endfor %}", "{{ messages }}"
# what the templates of Qwen3, DeepSeek and Llama are made of, and what jinja2 knows and transformers does not turn on
TEXTS = [
    "{%- set ns = namespace(last=messages|length - 1) %}{%- for m in messages[::-1] %}{%- set ns.last = loop.index0 %}"
    "{%- if m.content is string and not(m.content.startswith('<tool>')) %}{%- break %}{%- endif %}{%- endfor %}",
    "{% macro show(m, deep=true) %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endmacro %}"
    "{{ show(messages[0]) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% continue %}{% endfor %}",
    "{{ strftime_now('%d %b %Y') if strftime_now is defined else raise_exception('no') }}"
    "{{ tools | tojson(indent=4) }}",
    "{{ bos_token }}{% set x = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list %}",
    "{% filter trim %} a {% endfilter %}{% raw %}{{{% endraw %}{# {{ #}",
    "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
    "{% do messages.append(1) %}",
    "{% trans %}a{% endtrans %}",
    "{{ messages | no_such_filter }}",
    "{{ messages",
    "{% if messages %}",
    BAD,
]


def installed() -> list[str]:
    """Of vLLM, where it is installed."""
    spec = importlib.util.find_spec("vllm")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return [file.read_text("utf-8") for file in sorted(folder.rglob("*.jinja"))] if folder else []


@pytest.fixture
def folder(run_yaml: Path) -> Path:
    make_tokenizer().save_pretrained(run_yaml.parent / "model")
    return run_yaml.parent / "model"


def set_template(folder: Path, template: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))


@pytest.mark.parametrize("text", [*TEXTS, *installed()])
def test_what_transformers_compiles_is_taken_and_nothing_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text(text)
    try:
        _compile_jinja_template(text)
    except Exception:
        assert template_fault(str(tmp_path))
    else:
        assert template_fault(str(tmp_path)) is None


@pytest.mark.parametrize("command", ["run", "sft", "eval"])
def test_a_template_that_does_not_compile_starts_nothing(run_yaml: Path, folder: Path, command: str) -> None:
    (folder / "chat_template.jinja").write_text(BAD)
    with pytest.raises(UserError) as error:
        refusals.check(load_config(run_yaml), command)
    assert str(error.value) == (
        f"model.path: chat template 'default' of '{folder}/chat_template.jinja' does not compile (line 2, "
        "'{{ m.content }': unexpected '}'); mend it"
    )


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (BAD, "line 2"),
        ([{"name": "default", "template": BAD}, {"name": "rag", "template": GOOD}], "line 2"),
        ([{"name": "default", "template": GOOD}, {"name": "tool_use", "template": BAD}], "'tool_use'"),
        ([{"name": "rag", "template": GOOD}], "none is 'default'"),
        ([{"name": "default"}], "chat_template is no text"),
        (7, "chat_template is no text"),
        ([{"name": "default", "template": GOOD}, {"name": "rag", "template": BAD}], None),  # nobody uses that one
        ("", None),
        (None, None),
    ],
)
def test_a_template_in_the_tokenizer_s_settings(run_yaml: Path, folder: Path, template: Any, says: str | None) -> None:
    set_template(folder, template)
    with contextlib.nullcontext() if says is None else pytest.raises(UserError, match=says):
        refusals.check(load_config(run_yaml))


def test_a_template_is_found_where_transformers_finds_it(folder: Path) -> None:
    def agree() -> set[str]:
        theirs = load_tokenizer(ModelConfig(path=str(folder))).chat_template or {}
        ours = {name: text for name, (_, text) in chat_templates(str(folder)).items()}
        assert ours == ({"default": theirs} if isinstance(theirs, str) else theirs)
        return set(ours)

    (folder / "chat_template.json").write_text(json.dumps({"chat_template": BAD}))
    assert agree() == set()  # a processor's file
    set_template(folder, [{"name": "default", "template": GOOD}, {"name": "rag", "template": "r"}])
    assert agree() == {"default", "rag"}
    set_template(folder, GOOD)
    assert agree() == {"default"}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    assert agree() == {"tool_use"}
    (folder / "chat_template.jinja").write_text("c")
    assert agree() == {"default", "tool_use"}
