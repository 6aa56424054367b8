"""Waits that end when a condition holds, when the time is over, or when another thread stops them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mbridge_rl.core.errors import SyncError, TransferTimeout

_NAP_SECONDS = 50e-6
_LONGEST_NAP_SECONDS = 2e-3


class Timeout:
    """How long to wait for a peer.

    Args:
        seconds: the limit of each single wait.
        stopping: set by another thread to end a wait early.
    """

    def __init__(self, seconds: float, stopping: threading.Event | None = None) -> None:
        self.seconds = seconds
        self._stopping = stopping

    def wait_for(self, done: Callable[[], bool], complaint: str, check: Callable[[], None] | None = None) -> None:
        """Polls `done` until it is true, with naps that get longer.

        Args:
            done: the condition.
            complaint: the beginning of the message of a timeout.
            check: called before every nap; raises if waiting longer is of no use.

        Raises:
            TransferTimeout: the time is over. SyncError: another thread stopped the wait.
        """
        deadline, nap = time.monotonic() + self.seconds, _NAP_SECONDS
        while not done():
            if self._stopping is not None and self._stopping.is_set():
                raise SyncError("the update was given up")
            if time.monotonic() > deadline:
                raise TransferTimeout(f"{complaint} within {self.seconds:g} s")
            if check is not None:
                check()
            time.sleep(nap)
            nap = min(nap * 1.5, _LONGEST_NAP_SECONDS)
