"""Which version a worker serves, which one it is being changed to, and which one it lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Guard(Protocol):
    """Keeps a model from generating, for a reason, until it is released."""

    reason: str | None

    def block(self, reason: str) -> None: ...
    def release(self) -> None: ...


class Serving:
    """The state of one worker between and during updates, however they arrive.

    Attributes:
        version: the last one committed; `None` for the initial weights.
        updating: the one whose update is open.
        written: the open update has changed live weights.
        proof: identity of the live weights (`delta.proof_of`), where they were proven; what deltas may start from.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.version: int | None = None
        self.updating: int | None = None
        self.written = False
        self.proof: str | None = None
        self._lost: str | None = None

    @property
    def name(self) -> str:
        return "the initial weights" if self.version is None else f"version {self.version}"

    def begin(self, version: int, *, serves_on: bool = False) -> None:
        """Opens the update to `version`; until it ends nothing is generated, unless the old version `serves_on`."""
        self.updating, self.written = version, False
        if not serves_on:
            self.block()

    def block(self) -> None:
        """From here on the old version is not served."""
        self.guard.block(f"an update from {self.name} to version {self.updating} is under way")

    def commit(self, proof: str | None = None) -> None:
        self.version, self.updating, self._lost, self.proof = self.updating, None, None, proof
        self.guard.release()

    def abort(self, reason: str) -> None:
        """If nothing was written, the old version serves on; else the worker is unusable, and says what it lost."""
        version, self.updating = self.updating, None
        if self.written:
            self.proof = None
            self._lost = f"version {version} was lost (before it: {self.name}), and a complete sync has to come: {reason}"
        if self._lost is None:
            self.guard.release()
        else:
            self.guard.block(self._lost)

    @contextmanager
    def failing(self, abort: object, what: str) -> Iterator[None]:
        """Calls `abort(reason)` on whatever happens inside, also on KeyboardInterrupt: a mixture must never be served."""
        try:
            yield
        except BaseException as error:
            abort(f"{what}: {error}")  # type: ignore[operator]
            raise
