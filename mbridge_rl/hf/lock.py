"""A lock that one process at a time holds while it replaces a directory.

It is a `flock` on a hidden file beside the directory, so that it ends with its process in every case. The file names the
process that holds the lock, and is removed when the lock is released; a process that has locked a removed file tries again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from datetime import datetime
from pathlib import Path

from mbridge_rl.core.errors import CheckpointError

LOCK_SECONDS = 60.0  # how long a save waits for another save into the same place
_NAP_SECONDS = 0.05
_HOLDER_BYTES = 4096
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_held: set[int] = set()  # descriptors of this process's locks


class SaveLock:
    """An exclusive lock.

    Args:
        path: the lock's file.
        directory: the protected directory, for messages.
    """

    def __init__(self, path: Path, directory: Path) -> None:
        self.path = path
        self._directory = directory
        self._descriptor: int | None = None

    def acquire(self, seconds: float | None = None) -> None:
        """Waits for the lock.

        Args:
            seconds: how long to wait; `None` means `LOCK_SECONDS`.

        Raises:
            CheckpointError: another process still holds the lock, or the file system has no locks.
            OSError: the lock's file cannot be made.
        """
        seconds = LOCK_SECONDS if seconds is None else seconds
        deadline = time.monotonic() + seconds
        while not self._try():
            if time.monotonic() >= deadline:
                raise CheckpointError(self._busy(seconds))
            time.sleep(_NAP_SECONDS)

    def try_acquire(self) -> bool:
        """Takes the lock if it is free, and returns whether it was free. Raises the errors of `acquire`."""
        return self._try()

    def holder(self) -> tuple[str, str]:
        """A description of the process that holds the lock, and advice in case it hangs."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads(self.path.read_bytes()[:_HOLDER_BYTES])
            pid, host = int(holder["pid"]), str(holder["host"])
            return f"process {pid} on {host} (since {holder['since']})", f"if it hangs, end it (kill -9 {pid} on {host})"
        return "another process", "if it hangs, end it"

    def require_held(self) -> None:
        """Raises CheckpointError if the lock's file was removed, so that another process may hold the lock by now."""
        if self._descriptor is None or not _is_at(self.path, self._descriptor):
            raise CheckpointError(
                f"{self._directory} was not saved: somebody removed the lock {self.path} while it was held, so that another "
                "process may be saving there; see that only one does, and save again"
            )

    def release(self) -> None:
        """Releases the lock; does nothing if it is not held."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        with contextlib.suppress(OSError):
            if _is_at(self.path, descriptor):
                self.path.unlink()
        _close(descriptor)

    def _try(self) -> bool:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            _held.add(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(self.path, descriptor):  # otherwise the last holder has removed this file
                    self._descriptor = descriptor
                    self._write_holder()
                    return True
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    raise CheckpointError(
                        f"{self._directory} was not saved: {self.path} cannot be locked ({error}), so that two processes could "
                        "save there at once; mount the file system with locks (Lustre: -o flock), or save elsewhere"
                    ) from error
                raise
            finally:
                if self._descriptor is None:
                    _close(descriptor)

    def _write_holder(self) -> None:
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        assert self._descriptor is not None
        with contextlib.suppress(OSError):  # with a full disk the lock is held without a description
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _busy(self, seconds: float) -> str:
        holder, advice = self.holder()
        return (
            f"{self._directory} was not saved: {holder} has been saving there and was not done within {seconds:g} s; {advice}, "
            f"or save elsewhere. The lock is {self.path}: it ends with its holder, do not remove it by hand"
        )


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one at this path."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    opened = os.fstat(descriptor)
    return (named.st_ino, named.st_dev) == (opened.st_ino, opened.st_dev)


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _close_inherited() -> None:
    """Closes inherited locks in a fork, which would otherwise hold the lock of its parent even after the parent has died."""
    for descriptor in list(_held):
        _close(descriptor)


os.register_at_fork(after_in_child=_close_inherited)
