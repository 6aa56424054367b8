"""Locks on open files, which the kernel releases when their holder dies.

A lock by `flock` belongs to an open file, and a forked child has its parent's files open: a data loader's worker would keep the
lock of a trainer that was killed. So every child that Python forks closes what it inherited of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

_kept: dict[int, tuple[int, int]] = {}  # descriptor: device and inode, as numbers of descriptors are used again


def keep(descriptor: int) -> int:
    """From here on only `release` closes the descriptor, and children that are forked close theirs."""
    status = os.fstat(descriptor)
    _kept[descriptor] = status.st_dev, status.st_ino
    return descriptor


def release(descriptor: int) -> None:
    """Closes a descriptor that is kept, and with it ends its locks. Does nothing in a child that inherited it."""
    if _kept.pop(descriptor, None) is not None:
        os.close(descriptor)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Locks an open file, at once or not at all. A lock that it has is converted; where that fails, it has none."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _close_in_child() -> None:
    inherited = dict(_kept)
    _kept.clear()
    for descriptor, (device, inode) in inherited.items():
        with contextlib.suppress(OSError):
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) == (device, inode):
                os.close(descriptor)


os.register_at_fork(after_in_child=_close_in_child)
