"""What every page that the library writes must be."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any


class _Balanced(HTMLParser):
    """Raises where tags are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        """It is closed."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_self_contained(page: str) -> None:
    """Whole, and nothing is run or fetched."""
    parser = _Balanced()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r"(src|href)=|<script", page)
