"""Files that processes of one user share: they are made for that user alone, and opened only if they belong to that user.

Shared memory is one directory for all users of a host, and the names of stores are known. Without these checks, processes would
trust the file of another user who made it first.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mbridge_rl.core.errors import StoreError, SyncError

_MODE = 0o600
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # O_NONBLOCK: opening a FIFO of another user must not block
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def create_file(path: Path) -> int:
    """Makes a file that only this user may open; returns its descriptor.

    Raises:
        FileExistsError: there is a file, or a link, at `path`.
    """
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | _FLAGS, _MODE)


def open_file(path: Path, flags: int = os.O_RDONLY, error_type: type[SyncError] = StoreError) -> int:
    """Opens a file that belongs to this user (or root) and to which nobody else may write; returns its descriptor.

    Args:
        path: the file.
        flags: the flags of `os.open`; with `O_CREAT` the file is made if there is none.
        error_type: the type of the error.

    Raises:
        FileNotFoundError: there is no such file.
        SyncError: (of `error_type`) it belongs to another user, others may write to it, or it is not a plain file.
    """
    try:
        descriptor = os.open(path, flags | _FLAGS, _MODE)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise error_type(f"{path} cannot be opened: {_refusal(path, error)}") from error
    try:
        _require_own(path, os.fstat(descriptor), error_type)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_new_file(path: Path, content: bytes | memoryview) -> None:
    """Makes a file with `content` that only this user may open."""
    descriptor = create_file(path)
    try:
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
    finally:
        os.close(descriptor)


def read_file(path: Path) -> bytes:
    """The content of a file, which `open_file` opens."""
    with os.fdopen(open_file(path), "rb") as file:
        return file.read()


def is_named(path: Path, descriptor: int) -> bool:
    """Whether `path` is still the name of the open file, so that nobody has unlinked or replaced it."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    opened = os.fstat(descriptor)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _require_own(path: Path, status: os.stat_result, error_type: type[SyncError]) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise error_type(f"{path} is no plain file: remove it, or choose another name")
    if status.st_uid not in (os.geteuid(), 0):
        raise error_type(
            f"{path} belongs to user {status.st_uid}, this process is user {os.geteuid()}: what another user wrote is not "
            "trusted. Choose another name, or run both as one user"
        )
    if status.st_mode & _OTHERS_MAY_WRITE:
        raise error_type(
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o}, so that other users may write to it, expected 0600: remove "
            "it and let it be written anew"
        )


def _refusal(path: Path, error: OSError) -> str:
    try:
        owner = os.stat(path, follow_symlinks=False).st_uid
    except OSError:
        return str(error)
    return f"{error.strerror} (it belongs to user {owner}, this process is user {os.geteuid()}); choose another name"
