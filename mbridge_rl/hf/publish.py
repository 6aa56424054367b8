"""Replacing a directory, or a file, as a whole: at any moment, whoever is killed or stopped, the old or the new one is there.

    NAME                     what was saved last
    .NAME.lock               held by the one process that is saving (`hf.lock`)
    .NAME.ATTEMPT.incomplete what one attempt has written so far
    .NAME.ATTEMPT.previous   complete: what NAME was, or is about to be

Every attempt has a random number of its own, so that two processes never write into one directory, whatever happens to the
lock. What killed attempts left is removed by the next one, which holds the lock by then.
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
_ATTEMPT_BITS = 60  # it travels as a positive int64
_RENAME_SECONDS = 2.0  # between two renames, at most
_INCOMPLETE, _PREVIOUS = "incomplete", "previous"


class Replacement:
    """One attempt to replace a directory. One process begins, publishes and ends it; others that write into `path` join it.

    Args:
        lock: of several directories that are replaced under one lock, its file; `None` locks this directory alone.
        only_new: refuse a directory that has something in it.
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
        """Waits for the lock, repairs and removes what killed attempts left, and makes an empty staging directory.

        Returns:
            The attempt's number, for the processes that join.

        Raises:
            CheckpointError: another process is saving there, or there is something and must not be; OSError.
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
        """Another process began the attempt of this number."""
        self._attempt = attempt

    def publish(self, *, durable: bool) -> None:
        """Puts the staging directory in its place; the caller has made sure that it is complete.

        Weights that were there go, other files and directories stay. Where there was nothing it is one rename, and where there
        was something one exchange. A file system that cannot exchange needs two renames; the next save, or `put_back`, repairs
        what was interrupted between them.

        Args:
            durable: everything is on the disk before anything is replaced, and before the old directory is removed.

        Raises:
            CheckpointError: the lock was taken away; OSError. Either way the old directory is in its place.
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
        except OSError as error:  # saved it is; the next save tries again
            _log.warning("%s is saved, but what was there stays in %s: %s", self.directory, previous, error)
        else:
            shutil.rmtree(previous, ignore_errors=True)

    def end(self) -> None:
        """Removes what is staged still, and gives the lock back. Processes that joined do not call it."""
        if self._attempt is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()


def put_back(directory: Path) -> bool:
    """Restores a directory whose replacement was interrupted between two renames, or waits a moment while somebody is between
    them; returns whether it is there now. Where nothing can be done, nothing is raised.
    """
    directory = directory.absolute()
    with contextlib.suppress(OSError, CheckpointError):  # such as a place where we may only read
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
    """Removes what killed attempts to replace `directory` left; the caller holds the lock."""
    for path in _leftovers(directory, _INCOMPLETE):
        shutil.rmtree(path, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Writes `text` to a file that others may read, or that is there already, at once and durably."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}.{_INCOMPLETE}")
    try:
        staged.write_text(text)
        sync_to_disk(staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Returns when a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems can't sync directories
            raise
    finally:
        os.close(descriptor)


def _staged(directory: Path, attempt: int, what: str) -> Path:
    return directory.with_name(f".{directory.name}.{attempt:016x}.{what}")


def _leftovers(directory: Path, what: str) -> list[Path]:
    """Of attempts to replace `directory`, of older versions of this library, too; the newest first."""
    name = re.compile(rf"\.{re.escape(directory.name)}(\.[0-9a-f]{{16}})?\.{what}")
    with os.scandir(directory.parent) as entries:
        found = [entry for entry in entries if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
    return [Path(entry) for entry in sorted(found, key=lambda entry: _age(entry.path))]


def _age(path: str) -> float:
    try:
        return -os.stat(path).st_mtime
    except FileNotFoundError:  # whoever is saving there has just removed it
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
    """`staged` becomes `directory`, and what that was becomes `previous`.

    `staged` has the name `previous` from before the exchange on, so that a killed process never leaves the old directory under
    a name that is swept.
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


def _exchange(one: Path, other: Path) -> bool:
    """Returns whether the two have each other's place now: False where the system cannot."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return False
    if not exchange(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    if ctypes.get_errno() in _NO_EXCHANGE:
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


def _link_other_files(directory: Path, staged: Path) -> None:
    """Files that stay are in the new directory before it is seen."""
    for other in _others(directory, staged):
        if other.is_file() and not other.is_symlink():
            try:
                os.link(other, staged / other.name)
            except OSError:  # no hard links here
                shutil.copy2(other, staged / other.name)


def _carry_over(previous: Path, directory: Path) -> None:
    """Moves what stays, and is not there yet: directories, links, and files that appeared while others were linked."""
    for other in _others(previous, directory):
        other.rename(directory / other.name)


def _others(old: Path, new: Path) -> list[Path]:
    """What is no part of the old weights and has no successor."""
    weights = {*old.glob(_WEIGHTS), old / INDEX_FILE}
    return [path for path in old.iterdir() if path not in weights and not os.path.lexists(new / path.name)]


def _sync_files(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_file() and not path.is_symlink():
            sync_to_disk(path)
    sync_to_disk(directory)
