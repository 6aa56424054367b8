"""Bytes in shared memory: how weights cross from a trainer to an engine on one machine without being copied twice.

A writer maps the file shared. A reader maps it privately (copy on write), because some engines' weight loaders change the
tensors they are given: such a write stays in that reader and never reaches the other workers. Both touch every page once,
up front: first-touch page faults would cost several times the copy itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import re
import secrets
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mbridge_rl.sync.errors import ArenaError

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
_NAME = re.compile(r"mbridge_rl-(?P<pid>\d+)-[0-9a-f]+\.arena")
_PAGE = 4096


class Arena:
    """`nbytes` of shared memory behind a path. Make one with `Arena.create` (writer) or `Arena.attach` (reader)."""

    def __init__(self, path: Path, nbytes: int, *, writable: bool, lock: int | None = None) -> None:
        self.path = str(path)
        self.nbytes = nbytes
        self.writable = writable
        storage = torch.UntypedStorage.from_file(self.path, writable, nbytes)
        self._bytes: Tensor | None = torch.empty(0, dtype=torch.uint8).set_(storage)
        _touch(self._bytes)
        self._finalizer = weakref.finalize(self, _release, self.path, lock, os.getpid())

    @classmethod
    def create(cls, nbytes: int, directory: Path = SHARED_MEMORY) -> Arena:
        """A new arena that this process owns: it is unlinked at `close`, when dropped, and at exit.

        Arenas that killed processes left behind in `directory` are removed first.

        Raises:
            ArenaError: `nbytes` is not positive, or the directory has no room for them.
        """
        if nbytes <= 0:
            raise ArenaError(f"an arena needs a positive size, found {nbytes} bytes")
        remove_stale(directory)
        path = directory / f"mbridge_rl-{os.getpid()}-{secrets.token_hex(8)}.arena"
        lock = allocate(path, nbytes)
        return cls(path, nbytes, writable=True, lock=lock)

    @classmethod
    def attach(cls, path: str | Path, nbytes: int, *, writable: bool = False) -> Arena:
        """Map an arena that another process (or this one) created; writes stay private unless `writable` (a fellow writer).

        Raises:
            ArenaError: there is no such file, or it is smaller than `nbytes`.
        """
        path = Path(path)
        try:
            found = path.stat().st_size
        except FileNotFoundError as error:
            raise ArenaError(
                f"no arena at {path}: its writer closed it or died, or it runs on another machine or in another container"
            ) from error
        if found < nbytes:
            raise ArenaError(f"the arena at {path} holds {found} bytes, expected {nbytes}")
        return cls(path, nbytes, writable=writable)

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zero-copy tensor of `shape` and `dtype` that starts `offset` bytes into the arena.

        Raises:
            ArenaError: the arena is closed, or the tensor is misaligned or reaches past the end.
        """
        if self._bytes is None:
            raise ArenaError(f"the arena at {self.path} is closed")
        nbytes = math.prod(shape) * dtype.itemsize
        if offset < 0 or offset + nbytes > self.nbytes:
            raise ArenaError(f"bytes {offset}..{offset + nbytes} are outside of an arena of {self.nbytes} bytes")
        if offset % dtype.itemsize:
            raise ArenaError(f"offset {offset} is not aligned for {dtype} ({dtype.itemsize} bytes an element)")
        return self._bytes[offset : offset + nbytes].view(dtype).view(tuple(shape))

    def close(self) -> None:
        """Forget the mapping and, where this process created the arena, unlink it. Views handed out stay readable."""
        self._bytes = None
        self._finalizer()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def allocate(path: Path, nbytes: int) -> int:
    """Makes a file of `nbytes` and returns its descriptor, locked for as long as it stays open.

    Raises:
        ArenaError: its directory has no room for it.
    """
    lock = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.posix_fallocate(lock, 0, nbytes)  # fails here and now; a write to a full /dev/shm would be a bus error
    except OSError as error:
        _release(str(path), lock, os.getpid())
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        free = os.statvfs(path.parent)
        raise ArenaError(
            f"{path.parent} has no room for {nbytes} bytes ({free.f_bavail * free.f_frsize} are free); enlarge it (docker run "
            "--shm-size, mount -o remount,size=), sync with smaller buckets, or in mode 'streaming', which needs the least"
        ) from error
    return lock


def remove_stale(directory: Path = SHARED_MEMORY) -> list[Path]:
    """Unlink arenas in `directory` whose owner is gone, and return their paths.

    Gone means both: no process has the pid in the file's name, and nobody holds its lock (a pid alone lies where two
    containers share the directory).
    """
    removed = []
    for path in directory.glob("mbridge_rl-*.arena"):
        match = _NAME.fullmatch(path.name)
        if match is None or _is_alive(int(match["pid"])):
            continue
        with contextlib.suppress(OSError):  # locked by its owner, not ours, or gone by now
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path)
            finally:
                os.close(descriptor)
    if removed:
        logger.info("removed %d arenas of dead processes from %s", len(removed), directory)
    return removed


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _touch(data: Tensor) -> None:
    """Reads a byte of every page: the pages exist (`allocate`), and a shared mapping's may be written once they are mapped.
    Not even the same byte may be written back: what a fellow writer wrote in between would be undone."""
    data[::_PAGE].sum()


def _release(path: str, lock: int | None, owner: int) -> None:
    if lock is None or os.getpid() != owner:  # a reader, or a forked child that inherited the object
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    os.close(lock)
