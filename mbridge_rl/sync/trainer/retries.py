"""A sync that fails for a passing reason is tried again; whatever comes of it, the sinks hear of it once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from mbridge_rl.core.errors import DeltaRefused, DigestMismatch, TransferTimeout
from mbridge_rl.sync.record.report import SyncReport
from mbridge_rl.sync.record.sinks import Sink, tell
from mbridge_rl.sync.record.timeline import Stopwatch

_log = logging.getLogger(__name__)

_TRANSIENT = (TransferTimeout, DigestMismatch, DeltaRefused)  # worth another attempt; whatever else fails would fail again

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
    """All ranks together: what one of them raises all raise, so all try again or none does.

    Args:
        attempt: given its own watch, and whether it is the first.
        report: the record, of all attempts' watches, what came of the last, and its error.
        goes_on: whether the cause of a failure is gone; then there is another attempt, whatever `retries` says.
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
        found = report(watches, done, "")
        tell(sinks, found)
        return found
