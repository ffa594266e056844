"""Names in the configuration that are built in or a dotted path to something of the user's."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from megarl.errors import UserError


def import_dotted(key: str, name: str, kind: str, built_in: Iterable[str]) -> Callable[..., Any]:
    """The callable at `package.module.attribute`; modules of the
    working directory are found. kind: "function", "class".

    Raises UserError, one line that begins with `key` and `name`, where
    there is none; `built_in` names the alternatives.
    """
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        near = difflib.get_close_matches(name, built_in, n=1, cutoff=0.5)
        hint = (
            f"; did you mean {near[0]!r}?"
            if near
            else f"; choose one of {', '.join(built_in)} or a dotted path module.{kind}"
        )
        raise UserError(f"{key} {name!r} is unknown{hint}")
    if os.getcwd() not in sys.path:  # a console script does not look there, `python -m` does
        sys.path.append(os.getcwd())
    try:
        target = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as error:  # a user's module may raise anything
        raise UserError(
            f"{key} {name!r}: importing {module_name!r} failed ({type(error).__name__}: {error}); check the path"
        ) from None
    if not callable(target):
        raise UserError(f"{key} {name!r}: module {module_name!r} has no {kind} {attribute!r}; give module.{kind}")
    return target
