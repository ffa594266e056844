"""What tests read off a page of the report without a browser."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Collects what the tests ask of a page, and that its tags nest."""

    VOID = {"meta", "line", "circle", "polyline", "polygon", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def data(self) -> dict[str, Any]:
        """What its script reads."""
        place = next(i for i, word in enumerate(self.words) if word.startswith('{"steps"'))
        return json.loads(self.words[place])

    def ids(self, tag: str) -> list[str]:
        return [attributes.get("id") or "" for name, attributes in self.tags if name == tag]
