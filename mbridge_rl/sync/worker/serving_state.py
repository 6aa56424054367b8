"""The serving state of a worker: the version that it serves, the one that an update brings, and the one that it lost."""

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
        guard: keeps the model from generating.
        version: the version that was committed last; `None` for the initial weights.
        updating: the version of the open update; `None` if none is open.
        written: whether the open update has changed live weights.
        fill: the fill of an image, or the update, that brought the live weights; `None` for the initial weights, and for
            weights of no version. The workers of one engine have to agree on it.
        proof: the proof of the live weights (`packing.proof_of`) if they were proven, else `None`; deltas may start from it.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.version: int | None = None
        self.updating: int | None = None
        self.written = False
        self.fill: str | None = None
        self.proof: str | None = None
        self._lost: str | None = None
        self._before = self.name  # the name of what was served before the update

    @property
    def name(self) -> str:
        return "the initial weights" if self.version is None else f"version {self.version}"

    def begin(self, version: int, *, serves_on: bool = False) -> None:
        """Opens the update to `version`. Until it ends nothing is generated, unless `serves_on` lets the old version serve."""
        self.updating, self.written = version, False
        if self._lost is None:
            self._before = self.name
        if not serves_on:
            self.block()

    def block(self) -> None:
        """Stops serving the old version."""
        self.guard.block(f"an update from {self.name} to version {self.updating} is under way")

    def commit(self, proof: str | None = None, fill: str | None = None) -> None:
        self.version, self.updating, self._lost, self.proof, self.fill = self.updating, None, None, proof, fill
        self.guard.release()

    def abort(self, reason: str) -> None:
        """Ends the open update. If nothing was written, the old version serves on; else the worker is unusable, and its guard
        names the version that it lost."""
        version, self.updating = self.updating, None
        if self.written:
            self._lost = None
            self.lose(version, reason)
        elif self._lost is None:
            self.guard.release()
        else:
            self.guard.block(self._lost)

    def lose(self, version: int | None, reason: str) -> None:
        """Blocks the worker: its weights must not be served, even if `version` was committed. The reason of an earlier loss
        stays."""
        self.proof = self.fill = None
        lost = f"version {version} was lost (before it: {self._before}), and a complete sync has to come: {reason}"
        self._lost = self._lost or lost
        self.guard.block(self._lost)

    @contextmanager
    def failing(self, abort: object, complaint: str) -> Iterator[None]:
        """Calls `abort(reason)` on any exception inside the block, also on KeyboardInterrupt: a mixture of versions must never
        be served."""
        try:
            yield
        except BaseException as error:
            abort(f"{complaint}: {error}")  # type: ignore[operator]
            raise
