"""When what happened in a sync: spans of time on a clock that all processes share, so that they can be drawn side by side."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """Attributes:
    lane: whose time it is: "rank 1", "engine 0", "engine 0 worker 1".
    phase: what was done.
    inside: the phase of the same lane that contains it; empty for an outermost one.
    start, end: Unix seconds.
    busy: seconds that the phase took; less than `end - start` where it took turns with others.
    """

    lane: str
    phase: str
    inside: str
    start: float
    end: float
    busy: float

    @property
    def side(self) -> str:
        """`rank`, `engine` or `worker`: what kind of lane it is."""
        return self.lane.split()[-2]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Span:
        return cls(**said)


class Stopwatch:
    """The spans of one lane, one thread at a time. `with watch("transfer"):` makes one, or lengthens the one of that name; used
    inside of another such block it lies inside of that phase.

    Attributes:
        created: Unix seconds.
    """

    def __init__(self, lane: str) -> None:
        self._lane = lane
        self._offset = time.time() - time.perf_counter()  # durations must not follow a clock that is set
        self._open: list[tuple[str, float]] = []
        self._spans: dict[tuple[str, str], Span] = {}
        self.created = self.now()

    def now(self) -> float:
        """Unix seconds."""
        return self._offset + time.perf_counter()

    def begin(self, phase: str) -> None:
        """`phase` goes on until the `end` that belongs to it, in whatever call."""
        self._open.append((phase, self.now()))

    def end(self) -> None:
        """Of the phase that began last and is not over."""
        (phase, start), end = self._open.pop(), self.now()
        inside = self._open[-1][0] if self._open else ""
        known = self._spans.get((inside, phase))
        begun, busy = (start, 0.0) if known is None else (known.start, known.busy)
        self._spans[inside, phase] = Span(self._lane, phase, inside, begun, end, busy + end - start)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.begin(phase)
        try:
            yield
        finally:
            self.end()

    @property
    def spans(self) -> list[Span]:
        """In the order in which they ended first."""
        return list(self._spans.values())

    @property
    def seconds(self) -> dict[str, float]:
        """Of every phase, the outer and the inner ones."""
        total: dict[str, float] = {}
        for span in self._spans.values():
            total[span.phase] = total.get(span.phase, 0.0) + span.busy
        return total


def outermost(spans: Iterable[Span], lane: str) -> dict[str, float]:
    """Seconds of each outermost phase of a lane; they follow one another, so that they add up to its time."""
    total: dict[str, float] = {}
    for span in spans:
        if span.lane == lane and not span.inside:
            total[span.phase] = total.get(span.phase, 0.0) + span.busy
    return total


def slowest(spans: Iterable[Span]) -> dict[str, dict[str, float]]:
    """Of every phase, by side, the seconds of the lane that it took longest: `{"rank": {"pack": ...}, "worker": ...}`."""
    total: dict[tuple[str, str, str], float] = {}
    for span in spans:
        kind = (span.side, span.phase, span.lane)
        total[kind] = total.get(kind, 0.0) + span.busy
    found: dict[str, dict[str, float]] = {}
    for (side, phase, _), seconds in total.items():
        of_side = found.setdefault(side, {})
        of_side[phase] = max(of_side.get(phase, 0.0), seconds)
    return found


def of_engine(said: Sequence[Mapping[str, Any]], index: int) -> list[Span]:
    """What engine number `index` said of itself ("engine") and its workers ("worker 1")."""
    spans = [Span.from_json(span) for span in said]
    return [replace(span, lane=f"engine {index}" if span.lane == "engine" else f"engine {index} {span.lane}") for span in spans]
