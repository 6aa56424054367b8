"""The results of a sync's attempt that committed, and the report that is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mbridge_rl.sync.options import SyncOptions
from mbridge_rl.sync.payload.delta import Delta
from mbridge_rl.sync.payload.messages import CommitReport
from mbridge_rl.sync.payload.route import Route
from mbridge_rl.sync.record.report import EngineOutcome, SyncReport
from mbridge_rl.sync.record.timeline import Span, Stopwatch, of_engine


@dataclass(frozen=True)
class Committed:
    """The results of an attempt that committed; those of a failed attempt are empty.

    Attributes:
        digest: the digest of all weights; `None` without verification.
        delta: the delta that was sent; `None` if everything was sent.
        outcomes: the outcome of every engine.
        engine_reports: the reports of the engines that committed, on rank 0 (empty elsewhere).
        other_spans: the time spans of the other ranks.
    """

    digest: str | None = None
    delta: Delta | None = None
    outcomes: Sequence[EngineOutcome] = ()
    engine_reports: Sequence[CommitReport] = ()
    other_spans: Sequence[Span] = ()

    @property
    def engine_spans(self) -> Iterator[Span]:
        """The time spans of the engines and their workers, with the index of the engine; there are some on rank 0 only."""
        committed = [outcome.engine for outcome in self.outcomes if outcome.error is None]
        for engine, report in zip(committed, self.engine_reports, strict=False):
            yield from of_engine(report.spans, engine)


def report_of(
    version: int,
    watches: Sequence[Stopwatch],
    committed: Committed,
    error: str,
    *,
    options: SyncOptions,
    route: Route,
    transport: str,
    tensors: int,
    rank: int,
    planning: Sequence[Span],
) -> SyncReport:
    """The report of a sync whose last attempt ended just now.

    Args:
        version: the version that the sync brought.
        watches: the stopwatches of all attempts.
        committed: the results of the last attempt.
        error: the error of the last attempt; empty if it committed.
        options: the options of the sync.
        route: what each engine worker receives in a full sync.
        transport: the name of the transport.
        tensors: number of HF tensors.
        rank: the trainer rank that makes the report.
        planning: the time spans of the plan, in the first report.
    """
    full_nbytes = sum(worker.payload_bytes for worker in route.workers)
    own_spans = [span for watch in watches for span in watch.spans]
    return SyncReport(
        version=version,
        tensors=tensors,
        nbytes=full_nbytes if committed.delta is None else committed.delta.nbytes,
        full_nbytes=full_nbytes,
        base=None if committed.delta is None else committed.delta.base,
        buckets=sum(len(worker.buckets) for worker in route.workers),
        digest=committed.digest,
        verified=options.verify and not error,
        seconds=watches[-1].now() - watches[0].created,
        mode=options.mode,
        transport=transport,
        attempts=len(watches),
        engines=[report.to_record() for report in committed.engine_reports],
        outcomes=committed.outcomes,
        error=error,
        started=watches[0].created,
        rank=rank,
        spans=[*planning, *own_spans, *committed.other_spans, *committed.engine_spans],
    )
