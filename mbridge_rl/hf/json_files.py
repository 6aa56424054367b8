"""Reads untrusted JSON files into dataclasses, with bounds and types, and with errors that name file, field and value."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, TypeVar

from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.json_text import JSONTextError, parse_json
from mbridge_rl.core.typed_values import kind, read_fields

T = TypeVar("T")

_MOST_BYTES = 1 << 20
_SHOWN_PROBLEMS = 8


def open_file(path: Path) -> int:
    """Opens a regular file for reading and returns its descriptor. Other files are refused (a pipe would wait for its writer).

    Raises:
        CheckpointError: the file is missing, not a regular file, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; download or save it again") from error
    except (OSError, ValueError) as error:  # an impossible file name is a ValueError
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} cannot be read: it is no regular file")
    return descriptor


def read_json_object(path: Path, *, most_bytes: int = _MOST_BYTES) -> dict[str, Any]:
    """The fields of a JSON file that holds an object.

    Raises:
        CheckpointError: the file is missing, larger than `most_bytes`, no JSON in UTF-8, or holds no object.
    """
    with os.fdopen(open_file(path), "rb") as file:
        try:
            value = parse_json(file.read(most_bytes + 1), most_bytes=most_bytes)
        except (OSError, JSONTextError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; download or save it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold an object with fields, found {kind(value)}")
    return value


def read_json(path: Path, cls: type[T], *, most_bytes: int = _MOST_BYTES) -> T:
    """Reads the dataclass `cls` from a JSON file, which may have more fields.

    Raises:
        CheckpointError: the file cannot be read, or fields are missing, of a wrong type or out of range; the message names
            each.
    """
    return from_json(read_json_object(path, most_bytes=most_bytes), cls, str(path))


def from_json(value: object, cls: type[T], where: str) -> T:
    """Makes the dataclass `cls` from parsed JSON, which may have more fields.

    Args:
        where: the origin of the JSON, for the error.

    Raises:
        CheckpointError: fields are missing, of a wrong type or out of range; the message names each.
    """
    problems: list[str] = []
    result = read_fields(cls, value, problems, others="ignore")
    if result is None:
        more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:_SHOWN_PROBLEMS])}{more}")
    return result
