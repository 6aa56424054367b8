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
        fill: which fill of an image, or which update, the live weights came by; `None` for the initial weights, and where they
            are those of no version. Workers of one engine have to agree on it.
        proof: what the live weights are (`packing.proof_of`), where they were proven; what deltas may start from.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.version: int | None = None
        self.updating: int | None = None
        self.written = False
        self.fill: str | None = None
        self.proof: str | None = None
        self._lost: str | None = None
        self._before = self.name  # what was served last before an update

    @property
    def name(self) -> str:
        return "the initial weights" if self.version is None else f"version {self.version}"

    def begin(self, version: int, *, serves_on: bool = False) -> None:
        """Opens the update to `version`; until it ends nothing is generated, unless the old version `serves_on`."""
        self.updating, self.written = version, False
        if self._lost is None:
            self._before = self.name
        if not serves_on:
            self.block()

    def block(self) -> None:
        """From here on the old version is not served."""
        self.guard.block(f"an update from {self.name} to version {self.updating} is under way")

    def commit(self, proof: str | None = None, fill: str | None = None) -> None:
        self.version, self.updating, self._lost, self.proof, self.fill = self.updating, None, None, proof, fill
        self.guard.release()

    def abort(self, reason: str) -> None:
        """If nothing was written, the old version serves on; else the worker is unusable, and says what it lost."""
        version, self.updating = self.updating, None
        if self.written:
            self._lost = None
            self.lose(version, reason)
        elif self._lost is None:
            self.guard.release()
        else:
            self.guard.block(self._lost)

    def lose(self, version: int | None, reason: str) -> None:
        """The weights are not to be served, whatever they are, also where `version` was committed. A loss before it stays."""
        self.proof = self.fill = None
        lost = f"version {version} was lost (before it: {self._before}), and a complete sync has to come: {reason}"
        self._lost = self._lost or lost
        self.guard.block(self._lost)

    @contextmanager
    def failing(self, abort: object, what: str) -> Iterator[None]:
        """Calls `abort(reason)` on whatever happens inside, also on KeyboardInterrupt: a mixture must never be served."""
        try:
            yield
        except BaseException as error:
            abort(f"{what}: {error}")  # type: ignore[operator]
            raise
