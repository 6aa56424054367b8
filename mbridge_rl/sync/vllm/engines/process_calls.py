"""What a trainer's process and an engine's child process send each other through their socket pair. Both run the same
installation. (The child runs `process.py` as its main module, whose own classes its parent could not find by name.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mbridge_rl.core.failure import Failure


@dataclass(frozen=True)
class Call:
    """A call of a method of the child's engine; arguments are encoded (`message_codec.encode`)."""

    number: int
    method: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """The reply to the call of this number: its encoded result, or its failure."""

    call: int
    result: object = None
    failure: Failure | None = None
