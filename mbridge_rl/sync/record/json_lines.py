"""Reads files of one JSON object per line, which may still be written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mbridge_rl.core.errors import BridgeError
from mbridge_rl.core.json_text import JSONTextError, parse_json
from mbridge_rl.core.typed_values import kind

_MOST_LINE_BYTES = 256 << 20  # enough for the report of a sync with many ranks


class LinesError(BridgeError, ValueError):
    """A file of JSON lines cannot be read, or has a complete line that is not a JSON object."""


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of all complete lines. An unfinished last line is left out.

    Raises:
        LinesError: the file cannot be read, or a line, which the message names by number, is not a JSON object.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise LinesError(f"{path} cannot be read: {error}") from error
    return [_fields(line, f"{path}, line {number}") for number, line in enumerate(text.split("\n")[:-1], 1) if line.strip()]


def _fields(line: str, where: str) -> dict[str, Any]:
    try:
        value = parse_json(line, most_bytes=_MOST_LINE_BYTES)
    except JSONTextError as error:
        raise LinesError(f"{where}: {error}") from error
    if not isinstance(value, dict):
        raise LinesError(f"{where} must hold an object with fields, found {kind(value)}")
    return value
