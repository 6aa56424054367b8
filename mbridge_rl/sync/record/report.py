"""The record of one sync: what it moved, what proves it, and where its time went. Sinks (`sync.record.sinks`) get every one."""

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
    """What became of one engine at a commit.

    Attributes:
        engine: its index among the engines of the sync.
        version: that it serves; `None` where it failed, and refuses to generate until the next sync or a `catch_up`.
        error: why it failed.
    """

    engine: int
    version: int | None
    error: str | None = None


@dataclass(frozen=True)
class SyncReport:
    """What one sync did, and the proof of it.

    Attributes:
        adapter: name of the one that moved, alone (`sync.adapter_sync`); `None` for weights.
        nbytes: that all workers of one engine are sent, weights alone, as planned. What they were handed, with alignment and
            digests, they count themselves: `bytes_per_worker` of their engine's report.
        full_nbytes: that they keep, and receive in a full sync.
        base: the version that a delta started from; `None` for a full sync.
        digest: of all weights that the trainer meant; every engine's equals it, or the sync had raised.
        verified: the engines proved their live weights against the trainer's digests.
        seconds: wall time, all of it.
        attempts: how many it took.
        engines: the own report of every engine that committed, on rank 0.
        outcomes: of every engine; empty in a record of a sync that raised.
        error: what ended it, in a record that sinks get of a sync that raised; empty otherwise.
        started: Unix seconds.
        rank: of the trainer, whose record this is.
        spans: of all trainer ranks (of many: of some, see `sync.record.phases`), and on rank 0 of the engines and their
        workers.
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
        """Of a full sync's bytes."""
        return self.nbytes / self.full_nbytes

    @property
    def failed(self) -> dict[int, str]:
        """Engines that did not commit while others did, by index, and why. They refuse to generate until the next sync, which
        brings them everything, or until a `catch_up`."""
        return {outcome.engine: outcome.error for outcome in self.outcomes if outcome.error is not None}

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of this rank's `check`, `encode` (of a delta), `begin`, `transfer`, `verify`, `decide`, `commit` (in which
        generation pauses) and `report`; of all attempts together. They follow one another: what `seconds` has beyond their sum
        is nobody's."""
        return outermost((span for span in self.spans if span.phase != PLAN), lane(self.rank))

    @property
    def slowest(self) -> dict[str, dict[str, float]]:
        """By side (`rank`, `engine`, `worker`) and phase, the seconds of the one that took longest: of ranks also `pack` and
        `wire` and, in the first report of a `WeightSync`, `plan` (making it, before `started`); of engines `pause` and what it
        consists of; of workers `receive`, `load`, `verify`, `derive`."""
        return slowest(self.spans)

    @property
    def pause_seconds(self) -> float:
        """That the engine which paused longest did not generate; 0 where no engine says so."""
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
        """The whole record in plain JSON types; `SyncReport.from_json` reads what is not derived."""
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
    def from_json(cls, said: Mapping[str, Any]) -> SyncReport:
        """The record that `to_json` made.

        Raises:
            BridgeError: it is none; every wrong field is named.
        """
        problems: list[str] = []
        report = read_fields(cls, said, problems, others="ignore")
        if report is not None:
            if report.seconds <= 0 or report.attempts < 1:
                problems.append(f"seconds={report.seconds} must be above 0 and attempts={report.attempts} at least 1")
            if nowhere := [span.lane for span in report.spans if not _LANE.fullmatch(span.lane)]:
                problems.append(f'spans: a lane is named as in "rank 1" or "engine 0 worker 1", found {shown(nowhere[0])}')
        if report is None or problems:
            raise BridgeError(f"no record of a sync: {listed(problems)}")
        return report


_PLAIN = tuple(name for name in SyncReport.__dataclass_fields__ if name not in ("engines", "outcomes", "spans"))
_LANE = re.compile(r"rank \d+|engine( \d+)?( worker \d+)?|worker \d+")
