"""Replaces a directory, or a file, as a whole: at any moment either the old or the new one is there, even if a process is
killed.

    NAME                     the last saved directory
    .NAME.lock               held by the one process that is saving (`hf.lock`)
    .NAME.ATTEMPT.incomplete the files that one attempt has written so far
    .NAME.ATTEMPT.previous   a complete directory: the old NAME, or the new one just before it takes its place

Every attempt has a random number, so that two processes never write into one directory, even if the lock fails. The next
attempt removes the leftovers of killed attempts while it holds the lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
import time
from pathlib import Path

from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.hf.checkpoint import INDEX_FILE
from mbridge_rl.hf.lock import SaveLock

_log = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # this file system, or kernel, cannot exchange two directories
_WEIGHTS = "model*.safetensors"
_ATTEMPT_BITS = 60  # an attempt's number is sent as a positive int64
_RENAME_SECONDS = 2.0  # longest time between the two renames of a replacement
_INCOMPLETE, _PREVIOUS = "incomplete", "previous"


class Replacement:
    """One attempt to replace a directory. One process begins, publishes and ends it; others that write into `path` join it.

    Args:
        lock: the file of a lock that several directories share; `None` locks this directory alone.
        only_new: refuse to replace a directory that is not empty.
    """

    def __init__(self, directory: str | Path, *, lock: Path | None = None, only_new: bool = False) -> None:
        self.directory = Path(directory).resolve()
        self._lock = SaveLock(lock or self.directory.with_name(f".{self.directory.name}.lock"), self.directory)
        self._only_new = only_new
        self._attempt: int | None = None

    @property
    def path(self) -> Path:
        """The staging directory of this attempt."""
        assert self._attempt is not None, "begin or join the attempt first"
        return _staged(self.directory, self._attempt, _INCOMPLETE)

    def begin(self) -> int:
        """Waits for the lock, repairs or removes the leftovers of killed attempts, and makes an empty staging directory.

        Returns:
            The attempt's number, for the processes that join.

        Raises:
            CheckpointError: another process is saving there, or the directory must be new and is not empty.
            OSError: the directory cannot be made.
        """
        _require_replaceable(self.directory)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            _put_back(self.directory)
            sweep(self.directory)
            if self._only_new and self.directory.exists() and any(self.directory.iterdir()):
                raise CheckpointError(
                    f"{self.directory} is there already and not empty; give another place, or remove it first"
                )
            self._attempt = secrets.randbits(_ATTEMPT_BITS)
            self.path.mkdir()
        except BaseException:
            self.end()
            raise
        return self._attempt

    def join(self, attempt: int) -> None:
        """Joins the attempt of this number, which another process began."""
        self._attempt = attempt

    def publish(self, *, durable: bool) -> None:
        """Puts the staging directory in its place; the caller has checked that it is complete.

        Old weights are removed, other files and directories stay. A new directory needs one rename, an old one is replaced by
        one exchange. A file system that cannot exchange needs two renames; if they are interrupted, the next save, or
        `put_back`, repairs the directory.

        Args:
            durable: whether all files are flushed to the disk before the directory is replaced, and before the old one is
                removed.

        Raises:
            CheckpointError: the lock was removed. The old directory is in its place.
            OSError: the directory cannot be replaced. The old directory is in its place.
        """
        self._lock.require_held()
        exists = self.directory.exists()
        if exists:
            _link_other_files(self.directory, self.path)
        if durable:
            _sync_files(self.path)
        if not exists:
            self.path.rename(self.directory)
            if durable:
                sync_to_disk(self.directory.parent)
            return
        assert self._attempt is not None
        previous = _staged(self.directory, self._attempt, _PREVIOUS)
        _swap(self.path, self.directory, previous)
        try:
            _carry_over(previous, self.directory)
            if durable:
                sync_to_disk(self.directory)
                sync_to_disk(self.directory.parent)
        except OSError as error:  # the new directory is saved; the next save removes the old one
            _log.warning("%s is saved, but what was there stays in %s: %s", self.directory, previous, error)
        else:
            shutil.rmtree(previous, ignore_errors=True)

    def end(self) -> None:
        """Removes the staging directory, if it still exists, and releases the lock. Processes that joined do not call it."""
        if self._attempt is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()


def put_back(directory: Path) -> bool:
    """Restores a directory whose replacement was interrupted between two renames, or waits a moment if another process is
    between them. Returns whether the directory exists now, and raises nothing.
    """
    directory = directory.absolute()
    with contextlib.suppress(OSError, CheckpointError):  # such as a directory without permission to write
        if directory.exists() or not directory.parent.is_dir() or not _leftovers(directory, _PREVIOUS):
            return directory.exists()
        lock, deadline = SaveLock(directory.with_name(f".{directory.name}.lock"), directory), time.monotonic() + _RENAME_SECONDS
        while not directory.exists() and time.monotonic() < deadline:
            if lock.try_acquire():
                try:
                    _put_back(directory)
                finally:
                    lock.release()
                break
            time.sleep(_RENAME_SECONDS / 100)
    return directory.exists()


def sweep(directory: Path) -> None:
    """Removes the leftovers of killed attempts to replace `directory`; the caller holds the lock."""
    for path in _leftovers(directory, _INCOMPLETE):
        shutil.rmtree(path, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Writes `text` to a new or an existing file, atomically for its readers, and flushes it to the disk."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}.{_INCOMPLETE}")
    try:
        staged.write_text(text)
        sync_to_disk(staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Flushes a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync directories
            raise
    finally:
        os.close(descriptor)


def _staged(directory: Path, attempt: int, suffix: str) -> Path:
    return directory.with_name(f".{directory.name}.{attempt:016x}.{suffix}")


def _leftovers(directory: Path, suffix: str) -> list[Path]:
    """The directories with this suffix that attempts to replace `directory` left, by older versions of this library, too; the
    newest first."""
    name = re.compile(rf"\.{re.escape(directory.name)}(\.[0-9a-f]{{16}})?\.{suffix}")
    with os.scandir(directory.parent) as entries:
        leftovers = [entry for entry in entries if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
    return [Path(entry) for entry in sorted(leftovers, key=lambda entry: _age(entry.path))]


def _age(path: str) -> float:
    try:
        return -os.stat(path).st_mtime
    except FileNotFoundError:  # another process that is saving there has just removed it
        return 0.0


def _require_replaceable(directory: Path) -> None:
    for path in (directory, *directory.parents):
        if path.exists():
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
            break
    if directory.is_mount():
        raise CheckpointError(
            f"{directory} is a mount point, which cannot be replaced as a whole: give a directory inside of it, such as "
            f"{directory / 'checkpoint'}"
        )


def _put_back(directory: Path) -> None:
    for previous in _leftovers(directory, _PREVIOUS):
        if directory.exists():
            _carry_over(previous, directory)
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(directory)
            _log.warning("%s was put back: the save that was to replace it was interrupted", directory)


def _swap(staged: Path, directory: Path, previous: Path) -> None:
    """Renames `staged` to `directory`, and the old `directory` to `previous`.

    `staged` gets the name `previous` before the exchange, so that a killed process never leaves the old directory under a name
    that `sweep` removes.
    """
    staged.rename(previous)
    try:
        if _exchange(previous, directory):
            return
    except OSError:
        previous.rename(staged)
        raise
    previous.rename(staged)
    directory.rename(previous)
    try:
        staged.rename(directory)
    except OSError:
        previous.rename(directory)
        raise


def _exchange(left: Path, right: Path) -> bool:
    """Exchanges two directories; returns False if the system cannot do this."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return False
    if not exchange(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE):
        return True
    if ctypes.get_errno() in _NO_EXCHANGE:
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(right))


def _link_other_files(directory: Path, staged: Path) -> None:
    """Links files that stay into the new directory, before it takes its place."""
    for other in _others(directory, staged):
        if other.is_file() and not other.is_symlink():
            try:
                os.link(other, staged / other.name)
            except OSError:  # the file system has no hard links
                shutil.copy2(other, staged / other.name)


def _carry_over(previous: Path, directory: Path) -> None:
    """Moves everything else that stays: directories, links, and files that appeared while others were linked."""
    for other in _others(previous, directory):
        other.rename(directory / other.name)


def _others(old: Path, new: Path) -> list[Path]:
    """The entries of the old directory that are no weights and do not exist in the new one."""
    weights = {*old.glob(_WEIGHTS), old / INDEX_FILE}
    return [path for path in old.iterdir() if path not in weights and not os.path.lexists(new / path.name)]


def _sync_files(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_file() and not path.is_symlink():
            sync_to_disk(path)
    sync_to_disk(directory)
