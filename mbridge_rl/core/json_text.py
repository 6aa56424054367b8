"""Reads JSON from untrusted sources, with bounds on its bytes and its nesting, and no name twice in one object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

MOST_DEPTH = 32


class JSONTextError(ValueError):
    """The text is no JSON, or exceeds the bounds."""


def parse_json(text: bytes | str, *, most_bytes: int = 1 << 20) -> Any:
    """Parses the text.

    Raises:
        JSONTextError: the text is no JSON in UTF-8, longer or nested more deeply than allowed, or an object has a name twice.
    """
    if len(text) > most_bytes:
        raise JSONTextError(f"more than {most_bytes:,} bytes")
    try:
        value = json.loads(text if isinstance(text, str) else str(text, "utf-8-sig"), object_pairs_hook=_object)
    except JSONTextError:
        raise
    except UnicodeDecodeError as error:
        raise JSONTextError(f"no UTF-8 at byte {error.start}") from error
    except RecursionError:
        raise JSONTextError(f"nested more than {MOST_DEPTH} levels deep") from None
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise JSONTextError(f"no JSON: {error}") from error
    _require_shallow(value)
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise JSONTextError(f"{twice[:100]!r} stands twice in one object")
    return value


def _require_shallow(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return
    raise JSONTextError(f"nested more than {MOST_DEPTH} levels deep")
