"""Locks on open files, which the kernel releases when their holder dies.

A lock by `flock` belongs to an open file, and a forked child has its parent's files open: a data loader's worker would hold the
lock of a trainer that was killed. So every child that Python forks closes the locked files that it inherited.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

_registered: dict[int, tuple[int, int]] = {}  # descriptor -> device and inode, because numbers of descriptors are reused


def keep(descriptor: int) -> int:
    """Registers a descriptor: from here on only `release` closes it, and forked children close theirs."""
    status = os.fstat(descriptor)
    _registered[descriptor] = status.st_dev, status.st_ino
    return descriptor


def release(descriptor: int) -> None:
    """Closes a registered descriptor, which ends its locks. Does nothing in a child that inherited it."""
    if _registered.pop(descriptor, None) is not None:
        os.close(descriptor)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Tries to lock an open file without waiting. A lock that it has is converted; if that fails, it has none."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _close_in_child() -> None:
    inherited = dict(_registered)
    _registered.clear()
    for descriptor, (device, inode) in inherited.items():
        with contextlib.suppress(OSError):
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) == (device, inode):
                os.close(descriptor)


os.register_at_fork(after_in_child=_close_in_child)
