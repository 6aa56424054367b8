"""What the terminal shows. Every text is shown as it is: rich's markup, emoji codes and highlighting are off. Characters that
would steer the terminal are spelled out, and so are those that its encoding lacks. Styles are given beside a text, never in it.
Nothing else in the library makes a rich console.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.text import Text

# Control characters but for line ends and tabs, marks that turn the direction of text, and halves of surrogate pairs.
_STEERING = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


class Terminal(Console):
    """A console that shows text as it is.

    Args:
        is_quiet: shows nothing.
        stderr: writes there instead of to the standard output.
        width: in columns; the terminal's by default.
        wraps: breaks lines at the width. Otherwise the terminal does, and copied lines stay whole.
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

    def render_str(self, text: str, **how: Any) -> Text:
        """Everything that rich is given as a string comes here: lines, cells of tables, titles."""
        how.update(markup=False, emoji=False, highlight=False)
        return super().render_str(self.plain(text), **how)

    def plain(self, text: str) -> str:
        """`text` in the terminal's encoding, without characters that would steer it."""
        spelled_out = _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        return spelled_out.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def line(self, *parts: str | tuple[str, str]) -> None:
        """Prints one line of texts, or of `(text, style)`."""
        self.print(self.styled(parts))

    def styled(self, parts: Iterable[str | tuple[str, str]]) -> Text:
        """Texts, or `(text, style)`, as one, for a cell of a table."""
        joined = Text()
        for part in parts:
            text, style = part if isinstance(part, tuple) else (part, "")
            joined.append(self.plain(text), style or None)
        return joined
