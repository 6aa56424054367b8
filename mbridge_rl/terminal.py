"""Output to the terminal. Every text is shown literally: rich's markup, emoji codes and highlighting are off. Characters that
would control the terminal are escaped, and so are those that its encoding lacks. Styles are given beside a text, never in it.
No other module of the library makes a rich console.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.text import Text

# Control characters except for line ends and tabs, marks that change the direction of text, and halves of surrogate pairs.
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


class Terminal(Console):
    """A console that shows text literally.

    Args:
        is_quiet: whether nothing is shown.
        stderr: whether it writes to the standard error instead of the standard output.
        width: width in columns; the terminal's by default.
        wraps: whether lines are broken at the width. Otherwise the terminal breaks them, so that copied lines are not broken.
    """

    def __init__(
        self, *, is_quiet: bool = False, stderr: bool = False, width: int | None = None, wraps: bool = False, **rich: Any
    ) -> None:
        super().__init__(
            quiet=is_quiet,
            stderr=stderr,
            width=width,
            soft_wrap=not wraps,
            markup=False,
            emoji=False,
            highlight=False,
            **rich,
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """Renders every string that rich gets: lines, cells of tables, titles."""
        options.update(markup=False, emoji=False, highlight=False)
        return super().render_str(self.plain(text), **options)

    def plain(self, text: str) -> str:
        """`text` in the terminal's encoding, without characters that would control the terminal."""
        escaped = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
        return escaped.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def line(self, *parts: str | tuple[str, str]) -> None:
        """Prints one line that consists of texts, or of pairs `(text, style)`."""
        self.print(self.styled(parts))

    def styled(self, parts: Iterable[str | tuple[str, str]]) -> Text:
        """Joins texts, or pairs `(text, style)`, to one text, for a cell of a table."""
        joined = Text()
        for part in parts:
            text, style = part if isinstance(part, tuple) else (part, "")
            joined.append(self.plain(text), style or None)
        return joined
