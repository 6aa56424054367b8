"""The report of one sync: what it moved, what proves it, and where its time went. Sinks (`sync.record.sinks`) get it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mbridge_rl.core.errors import BridgeError, listed
from mbridge_rl.core.typed_values import read_fields, shown
from mbridge_rl.sync.record.phases import PLAN, lane
from mbridge_rl.sync.record.timeline import Span, outermost, slowest


@dataclass(frozen=True)
class EngineOutcome:
    """The outcome of a commit in one engine.

    Attributes:
        engine: the index of the engine among the engines of the sync.
        version: the version that it serves; `None` if it failed: then it refuses to generate until the next sync or a
            `catch_up`.
        error: why it failed; `None` if it did not.
    """

    engine: int
    version: int | None
    error: str | None = None


@dataclass(frozen=True)
class SyncReport:
    """What one sync did, and the proof of it.

    Attributes:
        version: the version that the sync brought.
        tensors: number of HF tensors.
        nbytes: bytes of the weights that all workers of one engine are sent, as planned. The workers themselves count what they
            receive, with alignment and digests: `bytes_per_worker` of their engine's report.
        buckets: number of buckets of all workers of one engine.
        digest: the digest of all weights of the trainer; that of every engine is the same, or the sync raised.
        verified: whether the engines proved their live weights against the trainer's digests.
        seconds: wall time of the whole sync.
        mode: `staged` or `streaming`.
        transport: the transport that was used.
        attempts: number of attempts.
        engines: the report of every engine that committed, on rank 0.
        error: the error of a sync that raised; empty otherwise.
        started: when the sync started, in Unix seconds.
        rank: the trainer rank that made this report.
        spans: the time spans of all trainer ranks (of some, if there are many: see `sync.record.phases`), and on rank 0 of the
            engines and their workers.
        full_nbytes: bytes of all weights of the workers, which they receive in a full sync.
        base: the version that a delta started from; `None` for a full sync.
        outcomes: the outcome of every engine; empty in the report of a sync that raised.
        adapter: the name of the adapter, if only an adapter was moved (`sync.adapter_sync`); `None` for weights.
    """

    version: int
    tensors: int
    nbytes: int
    buckets: int
    digest: str | None
    verified: bool
    seconds: float
    mode: str = "staged"
    transport: str = "auto"
    attempts: int = 1
    engines: Sequence[Mapping[str, Any]] = field(default=())
    error: str = ""
    started: float = 0.0
    rank: int = 0
    spans: Sequence[Span] = field(default=())
    full_nbytes: int = 0
    base: int | None = None
    outcomes: Sequence[EngineOutcome] = field(default=())
    adapter: str | None = None

    @property
    def share(self) -> float:
        """The share of a full sync's bytes that was sent."""
        return self.nbytes / self.full_nbytes

    @property
    def failed(self) -> dict[int, str]:
        """The errors of the engines that did not commit while others did, by index. These engines refuse to generate until the
        next sync, which brings them everything, or until a `catch_up`."""
        return {outcome.engine: outcome.error for outcome in self.outcomes if outcome.error is not None}

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of this rank's `check`, `encode` (of a delta), `begin`, `transfer`, `verify`, `decide`, `commit` (in which
        generation pauses) and `report`, of all attempts together. They follow one another; the difference between `seconds` and
        their sum belongs to no phase."""
        return outermost((span for span in self.spans if span.phase != PLAN), lane(self.rank))

    @property
    def slowest(self) -> dict[str, dict[str, float]]:
        """By side (`rank`, `engine`, `worker`) and phase, the seconds of the lane that took longest. Ranks also have `pack` and
        `wire` and, in the first report of a `WeightSync`, `plan` (making the `WeightSync`, before `started`); engines have
        `pause` and its parts; workers have `receive`, `load`, `verify`, `derive`."""
        return slowest(self.spans)

    @property
    def pause_seconds(self) -> float:
        """Seconds in which the engine that paused longest did not generate; 0 if no engine reports a pause."""
        return self.slowest.get("engine", {}).get("pause", 0.0)

    @property
    def retries(self) -> int:
        return self.attempts - 1

    @property
    def engine(self) -> Mapping[str, Any]:
        """The first engine's report, on rank 0."""
        return self.engines[0] if self.engines else {}

    @property
    def gigabytes_per_second(self) -> float:
        return self.nbytes / self.seconds / 1e9

    def to_json(self) -> dict[str, Any]:
        """The report in plain JSON types, with its derived numbers; `SyncReport.from_json` reads what is not derived."""
        own = {name: getattr(self, name) for name in _PLAIN}
        derived = {
            "retries": self.retries,
            "gigabytes_per_second": self.gigabytes_per_second,
            "pause_seconds": self.pause_seconds,
            "phases": self.phases,
            "slowest": self.slowest,
        }
        engines = [dict(engine) for engine in self.engines]
        outcomes = [asdict(outcome) for outcome in self.outcomes]
        return {**own, **derived, "engines": engines, "outcomes": outcomes, "spans": [span.to_json() for span in self.spans]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> SyncReport:
        """The report from which `to_json` made `fields`.

        Raises:
            BridgeError: `fields` is not a report; names every wrong field.
        """
        problems: list[str] = []
        report = read_fields(cls, fields, problems, others="ignore")
        if report is not None:
            if report.seconds <= 0 or report.attempts < 1:
                problems.append(f"seconds={report.seconds} must be above 0 and attempts={report.attempts} at least 1")
            if unknown_lanes := [span.lane for span in report.spans if not _LANE.fullmatch(span.lane)]:
                problems.append(
                    f'spans: a lane is named as in "rank 1" or "engine 0 worker 1", found {shown(unknown_lanes[0])}'
                )
        if report is None or problems:
            raise BridgeError(f"no record of a sync: {listed(problems)}")
        return report


_PLAIN = tuple(name for name in SyncReport.__dataclass_fields__ if name not in ("engines", "outcomes", "spans"))
_LANE = re.compile(r"rank \d+|engine( \d+)?( worker \d+)?|worker \d+")
