"""Sends an error from one process to another as plain text: nothing is pickled, and the received text is not trusted."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NoReturn

from mbridge_rl.core.errors import BridgeError, EngineProcessError


@dataclass(frozen=True)
class Failure:
    """The description of an error that another process receives.

    ```python
    failure = Failure.of(StoreError("the store is gone"))
    Failure.from_json(failure.to_json()).raise_()  # StoreError: the store is gone
    ```

    Attributes:
        kind: the name of the error's class.
        message: the error's message.
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
        for error_class in known:  # the list grows during the iteration
            known += error_class.__subclasses__()
        own_class = next((error_class for error_class in known if error_class.__name__ == self.kind), None)
        builtin = getattr(builtins, self.kind, None)
        if own_class is None and isinstance(builtin, type) and issubclass(builtin, Exception):
            return builtin
        return own_class

    def error(self) -> Exception:
        """Makes the error again, of its own class if this process knows that class, otherwise an `EngineProcessError` that
        names it."""
        error_class = self.error_class
        return EngineProcessError(str(self)) if error_class is None else error_class(self.message)

    def raise_(self) -> NoReturn:
        raise self.error()

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"
