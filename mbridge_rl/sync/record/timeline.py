"""Spans of time in a sync, on a clock that all processes share, so that they can be drawn side by side."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """The time of one phase in one lane.

    Attributes:
        lane: the participant: "rank 1", "engine 0", "engine 0 worker 1".
        phase: the name of the phase.
        inside: the phase of the same lane that contains it; empty for an outermost one.
        start: when it began first, in Unix seconds.
        end: when it ended last, in Unix seconds.
        busy: seconds that the phase took; less than `end - start` if it alternated with other phases.
    """

    lane: str
    phase: str
    inside: str
    start: float
    end: float
    busy: float

    @property
    def side(self) -> str:
        """The kind of the lane: `rank`, `engine` or `worker`."""
        return self.lane.split()[-2]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Span:
        return cls(**fields)


class Stopwatch:
    """Measures the spans of one lane, in one thread at a time. `with watch("transfer"):` makes a span, or lengthens the span of
    that name. A block inside another such block makes a span inside that phase.

    Attributes:
        created: when it was made, in Unix seconds.
    """

    def __init__(self, lane: str) -> None:
        self._lane = lane
        self._offset = time.time() - time.perf_counter()  # durations must not change when the clock is set
        self._open: list[tuple[str, float]] = []
        self._spans: dict[tuple[str, str], Span] = {}
        self.created = self.now()

    def now(self) -> float:
        """The time now, in Unix seconds."""
        return self._offset + time.perf_counter()

    def begin(self, phase: str) -> None:
        """Begins `phase`, which goes on until the matching `end`, which may come in another call."""
        self._open.append((phase, self.now()))

    def end(self) -> None:
        """Ends the phase that began last and is not over."""
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
        """The spans, in the order in which they ended first."""
        return list(self._spans.values())

    @property
    def seconds(self) -> dict[str, float]:
        """The busy seconds of every phase, the outer and the inner ones."""
        total: dict[str, float] = {}
        for span in self._spans.values():
            total[span.phase] = total.get(span.phase, 0.0) + span.busy
        return total


def outermost(spans: Iterable[Span], lane: str) -> dict[str, float]:
    """Seconds of each outermost phase of a lane. These phases follow one another, so they add up to the lane's time."""
    total: dict[str, float] = {}
    for span in spans:
        if span.lane == lane and not span.inside:
            total[span.phase] = total.get(span.phase, 0.0) + span.busy
    return total


def slowest(spans: Iterable[Span]) -> dict[str, dict[str, float]]:
    """The seconds of every phase, by side, in the lane where it took longest: `{"rank": {"pack": ...}, "worker": ...}`."""
    total: dict[tuple[str, str, str], float] = {}
    for span in spans:
        kind = (span.side, span.phase, span.lane)
        total[kind] = total.get(kind, 0.0) + span.busy
    longest: dict[str, dict[str, float]] = {}
    for (side, phase, _), seconds in total.items():
        of_side = longest.setdefault(side, {})
        of_side[phase] = max(of_side.get(phase, 0.0), seconds)
    return longest


def of_engine(spans: Iterable[Span], index: int) -> list[Span]:
    """The spans that an engine reports, of itself ("engine") and of its workers ("worker 1"), with lanes that name engine
    `index`."""
    return [replace(span, lane=f"engine {index}" if span.lane == "engine" else f"engine {index} {span.lane}") for span in spans]
