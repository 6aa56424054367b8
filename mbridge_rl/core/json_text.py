"""JSON that others wrote, read strictly and within bounds: of bytes, of nesting, no name twice in one object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

MOST_DEPTH = 32


class JSONTextError(ValueError):
    """Text that is no JSON, or JSON beyond the bounds."""


def parse_json(text: bytes | str, *, most_bytes: int = 1 << 20, strict: bool = False) -> Any:
    """What the text says.

    Args:
        strict: refuses what Python reads and the standard does not allow: `NaN`, `Infinity`, and halves of surrogate pairs.

    Raises:
        JSONTextError: it is no JSON in UTF-8, longer or nested more deeply than allowed, or an object has a name twice.
    """
    if len(text) > most_bytes:
        raise JSONTextError(f"more than {most_bytes:,} bytes")
    try:
        value = json.loads(
            text if isinstance(text, str) else str(text, "utf-8-sig"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant if strict else None,
        )
    except JSONTextError:
        raise
    except UnicodeDecodeError as error:
        raise JSONTextError(f"no UTF-8 at byte {error.start}") from error
    except RecursionError:
        raise JSONTextError(f"nested more than {MOST_DEPTH} levels deep") from None
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise JSONTextError(f"no JSON: {error}") from error
    _require_shallow(value)
    if strict:
        _require_unicode(value, text)
    return value


def _refuse_constant(name: str) -> None:
    raise JSONTextError(f"no JSON: {name} is no number there")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise JSONTextError(f"{twice[:100]!r} stands twice in one object")
    return value


def _require_unicode(value: Any, text: bytes | str) -> None:
    """`value` is what `text` says. Only an escape can make a text of it that has no UTF-8."""
    if ("\\u" if isinstance(text, str) else b"\\u") not in text:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise JSONTextError("no JSON: a text in it holds one half of a surrogate pair") from error


def _require_shallow(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return
    raise JSONTextError(f"nested more than {MOST_DEPTH} levels deep")
