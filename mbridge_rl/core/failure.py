"""An error on its way from one process to another, as plain text: nothing is pickled, and nothing that arrives is trusted."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NoReturn

from mbridge_rl.core.errors import BridgeError, EngineProcessError


@dataclass(frozen=True)
class Failure:
    """What another process learns of an error.

    ```python
    failure = Failure.of(StoreError("the store is gone"))
    Failure.from_json(failure.to_json()).raise_()  # StoreError: the store is gone
    ```

    Attributes:
        kind: name of the error's class.
        message: of the error.
    """

    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        return cls(type(error).__name__, str(error))

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, str]) -> Failure:
        return cls(value["kind"], value["message"])

    @property
    def error_class(self) -> type[Exception] | None:
        """The class of that name among this library's errors and Python's own; `None` if there is none."""
        known: list[type[BridgeError]] = [BridgeError]
        for error_class in known:  # the list grows meanwhile
            known += error_class.__subclasses__()
        ours = next((error_class for error_class in known if error_class.__name__ == self.kind), None)
        builtin = getattr(builtins, self.kind, None)
        if ours is None and isinstance(builtin, type) and issubclass(builtin, Exception):
            return builtin
        return ours

    def error(self) -> Exception:
        """The error again, of its own class where this process knows that; else an `EngineProcessError` that names it."""
        error_class = self.error_class
        return EngineProcessError(str(self)) if error_class is None else error_class(self.message)

    def raise_(self) -> NoReturn:
        raise self.error()

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"
