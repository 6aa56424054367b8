"""Repeats a sync that failed for a reason that may pass. The sinks get one report, whether the sync succeeds or fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from mbridge_rl.core.errors import DeltaRefused, DigestMismatch, TransferTimeout
from mbridge_rl.sync.record.report import SyncReport
from mbridge_rl.sync.record.sinks import Sink, tell
from mbridge_rl.sync.record.timeline import Stopwatch

_log = logging.getLogger(__name__)

_TRANSIENT = (TransferTimeout, DigestMismatch, DeltaRefused)  # worth another attempt; any other error would come again

Done = TypeVar("Done")


def with_retries(
    version: int,
    attempt: Callable[[Stopwatch, bool], Done],
    report: Callable[[Sequence[Stopwatch], Done | None, str], SyncReport],
    *,
    lane: str,
    retries: int,
    sinks: Iterable[Sink],
    goes_on: Callable[[Exception], bool] = lambda _: False,
) -> SyncReport:
    """Calls `attempt` until it succeeds or may not be repeated. All ranks call this together; they all raise what one of them
    raises, so all try again or none does.

    Args:
        version: the version of the sync, for the log.
        attempt: called with a new stopwatch and with whether this is the first attempt.
        report: makes the report of the sync from the stopwatches of all attempts, the result of the last one (`None` if it
            failed), and its error (`""` if it succeeded).
        lane: the lane of the stopwatches.
        retries: the number of further attempts after a failure that may pass.
        sinks: where the report goes.
        goes_on: whether the cause of a failure is gone; then there is another attempt, whatever `retries` is.
    """
    watches: list[Stopwatch] = []
    while True:
        watches.append(Stopwatch(lane))
        try:
            done = attempt(watches[-1], len(watches) == 1)
        except Exception as error:
            if goes_on(error):
                continue
            if isinstance(error, _TRANSIENT) and len(watches) <= retries:
                _log.warning("version %d, attempt %d failed, trying again: %s", version, len(watches), error)
                continue
            tell(sinks, report(watches, None, f"{type(error).__name__}: {error}"))
            raise
        sync_report = report(watches, done, "")
        tell(sinks, sync_report)
        return sync_report
