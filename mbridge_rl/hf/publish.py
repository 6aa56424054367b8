"""One directory takes another's place: the moment at which a staged checkpoint becomes the checkpoint."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

from mbridge_rl.hf.checkpoint import INDEX_FILE, SINGLE_FILE

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_WEIGHTS = "model*.safetensors"


def replace_directory(staged: Path, directory: Path, *, durable: bool) -> None:
    """Puts `staged` where `directory` is; both are on one file system. Weights that were there go, other files stay.

    Where there was nothing it is one rename, and where there was a plain directory of files one exchange: whoever looks, or
    kills us, finds the old checkpoint or the new one. Only what can't be exchanged (a mount point, a directory with directories
    inside, a file system without the call) is filled file by file: interrupted there, it holds no complete checkpoint.
    """
    if durable:
        _sync_files(staged)
    if not directory.exists():
        staged.rename(directory)
    elif _holds_only_files(directory) and _exchange_keeping_other_files(staged, directory):
        shutil.rmtree(staged)  # by now the old checkpoint
    else:
        _fill(staged, directory)
    if durable:
        _sync(directory)
        _sync(directory.parent)


def _holds_only_files(directory: Path) -> bool:
    return all(entry.is_file() and not entry.is_symlink() for entry in directory.iterdir())


def _exchange_keeping_other_files(staged: Path, directory: Path) -> bool:
    """Returns whether the exchange took place; if not, `directory` is untouched."""
    for other in _other_files(directory, staged):
        try:
            os.link(other, staged / other.name)
        except OSError:  # no hard links here
            shutil.copy2(other, staged / other.name)
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return False
    failed = exchange(_AT_FDCWD, os.fsencode(staged), _AT_FDCWD, os.fsencode(directory), _RENAME_EXCHANGE)
    if failed and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.EBUSY, errno.EXDEV, errno.EOPNOTSUPP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(directory))
    return not failed


def _other_files(directory: Path, staged: Path) -> list[Path]:
    """What is no part of the old weights and has no successor."""
    weights = {*directory.glob(_WEIGHTS), directory / INDEX_FILE}
    return [path for path in directory.iterdir() if path not in weights and not (staged / path.name).exists()]


def _fill(staged: Path, directory: Path) -> None:
    """File by file: what makes the old checkpoint complete goes first, what makes the new one complete comes last."""
    for old in (directory / INDEX_FILE, directory / SINGLE_FILE, *directory.glob(_WEIGHTS)):
        old.unlink(missing_ok=True)
    for path in sorted(staged.iterdir(), key=lambda path: path.name in (INDEX_FILE, SINGLE_FILE)):
        path.replace(directory / path.name)
    staged.rmdir()


def _sync_files(directory: Path) -> None:
    for path in directory.iterdir():
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems can't sync directories
            raise
    finally:
        os.close(descriptor)
