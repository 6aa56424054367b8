"""The lock by which only one session at a time writes to a weight store; a second trainer with the same store name is refused.

A session is one trainer or, for a store that engine workers fill on their own host, all workers that fill it for one trainer.
Its processes share a lock on the store's lock file, which describes the session. A new session first needs the lock
exclusively, so it begins when no process of the session before holds the lock any more: they ended, were killed, or closed the
store.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import secrets
import socket
import time
import weakref
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from mbridge_rl.core.errors import StoreError
from mbridge_rl.distributed.locks import keep, release, try_lock
from mbridge_rl.distributed.private_files import is_named, open_file

TAKE_OVER_SECONDS = 10.0  # how long a new session waits for the session before to end
_IN_ONE_PROCESS_SECONDS = 1.0
_NAP_SECONDS = 0.05
_LARGEST = 4096

Kind = Literal["named", "temporary", "durable"]


@dataclass(frozen=True)
class Holder:
    """The content of a lock file: the session that writes, or wrote last.

    Attributes:
        kind: when the store may be removed: an hour after its last writer (`named`), with it (`temporary`), never (`durable`).
        session: a random name, equal in all processes that write together.
        pid: the process that began the session.
        host: the host name of that process.
        started: when that process was started, in local time.
    """

    kind: Kind
    session: str
    pid: int
    host: str
    started: str

    @classmethod
    def of_this_process(cls, kind: Kind, session: str) -> Holder:
        return cls(kind, session, os.getpid(), socket.gethostname(), _started(os.getpid()))

    @classmethod
    def read(cls, descriptor: int) -> Holder | None:
        """Reads a lock file; `None` if it describes no session: it was made just now, or by an older library."""
        try:
            return cls(**json.loads(os.pread(descriptor, _LARGEST, 0)))
        except (ValueError, TypeError):
            return None

    def write(self, descriptor: int) -> None:
        content = json.dumps(asdict(self)).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)

    @property
    def is_this_process(self) -> bool:
        return self == Holder.of_this_process(self.kind, self.session)

    def __str__(self) -> str:
        here = " (this one)" if self.is_this_process else ""
        return f"process {self.pid}{here} on host {self.host!r}, which was started at {self.started}"


class WriterLock:
    """The lock of one process, or of one object in it.

    Args:
        path: the lock file.
        kind: the kind of the store.
        session: the name of the session; by default a new one, which no other process shares.
    """

    def __init__(self, path: Path, kind: Kind, session: str | None = None) -> None:
        self._path, self._kind = path, kind
        self.session = session or secrets.token_hex(16)
        self._descriptor: int | None = None
        self._finalizer: weakref.finalize[[int], WriterLock] | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object has the lock, and the lock file still has its name: removing the store ends all sessions."""
        return self._descriptor is not None and is_named(self._path, self._descriptor)

    @property
    def was_acquired(self) -> bool:
        return self._descriptor is not None

    def acquire(self, seconds: float) -> None:
        """Takes the lock; does nothing if this object has it already.

        Raises:
            StoreError: another session has had the lock for `seconds`; names its process and says what to do.
        """
        deadline, collected = time.monotonic() + seconds, False
        while not self.is_held:
            self.release()
            descriptor = open_file(self._path, os.O_CREAT | os.O_RDWR)
            if self._lock(descriptor):
                self._descriptor = keep(descriptor)
                self._finalizer = weakref.finalize(self, release, descriptor)
                return
            holder = Holder.read(descriptor)
            os.close(descriptor)
            if not collected and holder is not None and holder.is_this_process:
                collected = True
                gc.collect()  # the object that has the lock may be unused
                deadline = min(deadline, time.monotonic() + _IN_ONE_PROCESS_SECONDS)
            if time.monotonic() >= deadline:
                raise StoreError(self._refusal(holder))
            time.sleep(_NAP_SECONDS)

    def release(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._descriptor = self._finalizer = None

    def _lock(self, descriptor: int) -> bool:
        """Tries to lock the file for this session; returns whether it has the lock now."""
        before = Holder.read(descriptor)
        if before is not None and before.session == self.session:
            return try_lock(descriptor, shared=True) and self._is_ours(descriptor)
        if not try_lock(descriptor) or not is_named(self._path, descriptor):
            return False
        kind: Kind = "durable" if before is not None and before.kind == "durable" else self._kind
        Holder.of_this_process(kind, self.session).write(descriptor)
        return try_lock(descriptor, shared=True) and self._is_ours(descriptor)  # another session may have come in between

    def _is_ours(self, descriptor: int) -> bool:
        holder = Holder.read(descriptor)
        return holder is not None and holder.session == self.session and is_named(self._path, descriptor)

    def _refusal(self, holder: Holder | None) -> str:
        name = self._path.name.removeprefix("mbridge_rl-store-").removesuffix("-users.lock")
        who = "a process of an older mbridge_rl" if holder is None else str(holder)
        return (
            f"the weight store {name!r} in {self._path.parent} is being written by {who}: two trainers cannot share one store. "
            "End that process or close its WeightSync, or give this one another store name"
        )


@cache
def _started(pid: int) -> str:
    """When a process of this host was started, in local time."""
    with contextlib.suppress(OSError, ValueError):
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(round(booted + ticks / os.sysconf("SC_CLK_TCK"))))
    return "an unknown time"
