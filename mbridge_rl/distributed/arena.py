"""Shared memory through which weights cross from a trainer to an engine on one machine without being copied twice.

An arena is alive while its owner holds its lock. The pid in its name does not matter, because containers may share `/dev/shm`
but not their process numbers; it is there for people who look at the file.

A writer maps the file shared. A reader maps it privately (copy on write), because some engines' weight loaders change the
tensors that they are given: such a write stays in that reader and never reaches the other workers. Both touch every page once,
up front, because first-touch page faults would cost several times the copy itself.
"""

from __future__ import annotations

import contextlib
import errno
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

from mbridge_rl.core.errors import ArenaError
from mbridge_rl.distributed.locks import keep, release, try_lock
from mbridge_rl.distributed.private_files import create_file, open_file

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
_NAME = re.compile(r"mbridge_rl-\d+-[0-9a-f]+\.arena(\.[0-9a-f]+\.partial)?")
_PAGE = 4096


class Arena:
    """`nbytes` of shared memory behind a path. It is made by `Arena.create` (writer) or `Arena.attach` (reader).

    Args:
        path: the file.
        nbytes: bytes of the arena.
        writable: map the file shared, so that writes reach the other processes.
        lock: the descriptor of the lock that the owner holds as long as the arena lives; `None` in a process that does not own
            the arena.
        start: the first byte of the file that belongs to the arena; the bytes before it are `front`.
        descriptor: a descriptor of the file, if it is open already and was checked then; it stays open.
    """

    def __init__(
        self,
        path: Path,
        nbytes: int,
        *,
        writable: bool,
        lock: int | None = None,
        start: int = 0,
        descriptor: int | None = None,
    ) -> None:
        self.path = str(path)
        self.nbytes = nbytes
        self.writable = writable
        self._start = start
        opened = open_file(path, os.O_RDWR if writable else os.O_RDONLY, ArenaError) if descriptor is None else descriptor
        try:  # mapped by its descriptor, so that the file that was checked is the file that is mapped
            storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{opened}", writable, start + nbytes)
        finally:
            if descriptor is None:
                os.close(opened)
        self._mapped: Tensor | None = torch.empty(0, dtype=torch.uint8).set_(storage)
        _touch(self._mapped)
        self._finalizer = weakref.finalize(self, _release, self.path, lock, os.getpid())

    @classmethod
    def create(cls, nbytes: int, directory: Path = SHARED_MEMORY) -> Arena:
        """Makes a new arena that this process owns: it is unlinked at `close`, when it is garbage-collected, and at exit.

        Arenas that killed processes left in `directory` are removed first.

        Raises:
            ArenaError: `nbytes` is not positive, or the directory has no room for them.
        """
        if nbytes <= 0:
            raise ArenaError(f"an arena needs a positive size, found {nbytes} bytes")
        remove_stale(directory)
        path = directory / f"mbridge_rl-{os.getpid()}-{secrets.token_hex(8)}.arena"
        lock = allocate(path, nbytes)
        return cls(path, nbytes, writable=True, lock=keep(lock))

    @classmethod
    def attach(cls, path: str | Path, nbytes: int, *, writable: bool = False) -> Arena:
        """Maps an arena that another process (or this one) created. Writes stay private unless `writable`.

        Raises:
            ArenaError: there is no such file, or it is smaller than `nbytes`.
        """
        path = Path(path)
        try:
            file_nbytes = path.stat().st_size
        except FileNotFoundError as error:
            raise ArenaError(
                f"no arena at {path}: its writer closed it or died, or it runs on another machine or in another container"
            ) from error
        if file_nbytes < nbytes:
            raise ArenaError(f"the arena at {path} holds {file_nbytes} bytes, expected {nbytes}")
        return cls(path, nbytes, writable=writable)

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of `shape` and `dtype` that starts `offset` bytes into the arena, without a copy.

        Raises:
            ArenaError: the arena is closed, or the tensor is misaligned or reaches past the end.
        """
        if self._mapped is None:
            raise ArenaError(f"the arena at {self.path} is closed")
        nbytes = math.prod(shape) * dtype.itemsize
        if offset < 0 or offset + nbytes > self.nbytes:
            raise ArenaError(f"bytes {offset}..{offset + nbytes} are outside of an arena of {self.nbytes} bytes")
        if offset % dtype.itemsize:
            raise ArenaError(f"offset {offset} is not aligned for {dtype} ({dtype.itemsize} bytes an element)")
        first = self._start + offset
        return self._mapped[first : first + nbytes].view(dtype).view(tuple(shape))

    def front(self) -> bytes:
        """The bytes before the arena in its file, as they are now."""
        if self._mapped is None:
            raise ArenaError(f"the arena at {self.path} is closed")
        return self._mapped[: self._start].numpy().tobytes()

    def close(self) -> None:
        """Drops the mapping and, if this process created the arena, unlinks the file. Views of it stay readable."""
        self._mapped = None
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
    lock = _locked_file(path)
    try:
        os.posix_fallocate(lock, 0, nbytes)  # fails here; a later write to a full /dev/shm would be a bus error
    except OSError as error:
        path.unlink(missing_ok=True)
        os.close(lock)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        free = os.statvfs(path.parent)
        raise ArenaError(
            f"{path.parent} has no room for {nbytes} bytes ({free.f_bavail * free.f_frsize} are free); enlarge it (docker run "
            "--shm-size, mount -o remount,size=), sync with smaller buckets, or in mode 'streaming', which needs the least"
        ) from error
    return lock


def _locked_file(path: Path) -> int:
    """Makes a file that is locked from the moment when it has its name: `remove_stale` takes an unlocked file for that of a
    dead owner."""
    while True:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
        lock = create_file(partial)
        with contextlib.suppress(FileNotFoundError):  # `remove_stale` came in between
            if try_lock(lock):
                os.rename(partial, path)
                return lock
        os.close(lock)


def remove_stale(directory: Path = SHARED_MEMORY) -> list[Path]:
    """Unlinks this user's arenas in `directory` whose owner is gone, so that nobody holds their lock; returns their paths."""
    removed = []
    for path in directory.glob("mbridge_rl-*.arena*"):
        if _NAME.fullmatch(path.name) is None:
            continue
        with contextlib.suppress(OSError, ArenaError):  # it was removed meanwhile, or belongs to another user
            descriptor = open_file(path, os.O_RDWR, ArenaError)
            try:
                if try_lock(descriptor):
                    path.unlink()
                    removed.append(path)
            finally:
                os.close(descriptor)
    if removed:
        logger.info("removed %d arenas of dead processes from %s", len(removed), directory)
    return removed


def _touch(data: Tensor) -> None:
    """Maps every page by reading a byte of it. The pages exist already (`allocate`), and mapped pages of a shared mapping may
    be written. The byte is not written back, because that could undo a write of another process."""
    data[::_PAGE].sum()


def _release(path: str, lock: int | None, owner: int) -> None:
    if lock is None or os.getpid() != owner:  # a reader, or a forked child that inherited the object
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    release(lock)
