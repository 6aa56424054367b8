"""Ends a streaming update whose trainer died, so that the engine does not hold its requests for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from mbridge_rl.sync.payload.messages import WorkerStatus

_LOOK_SECONDS = 0.2


class UpdateWatch:
    """Aborts a streaming update whose workers failed, or that nobody commits.

    Args:
        status: returns the status of every worker (`PayloadReceiver.status`).
        abort: called once, with the reason.
        timeout: seconds between the arrival of everything and the commit.
    """

    def __init__(self, status: Callable[[], Sequence[WorkerStatus]], abort: Callable[[str], object], timeout: float) -> None:
        self._status, self._abort, self._timeout = status, abort, timeout
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="mbridge-watch", daemon=True).start()

    def end(self) -> None:
        """Stops watching, because the update was committed or aborted."""
        self._over.set()

    def _watch(self) -> None:
        arrived: float | None = None
        while not self._over.wait(_LOOK_SECONDS):
            workers = self._status()
            failures = [worker.failure for worker in workers if worker.failure is not None]
            if arrived is None and all(worker.arrived for worker in workers):
                arrived = time.monotonic()
            late = arrived is not None and time.monotonic() - arrived > self._timeout
            if (failures or late) and not self._over.is_set():
                self._over.set()
                reason = str(failures[0]) if failures else f"it was not committed within {self._timeout:g} s"
                self._abort(f"its trainer is gone ({reason})")
                return
