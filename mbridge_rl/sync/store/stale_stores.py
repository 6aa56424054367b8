"""Checks names of weight stores, and removes stores whose writers are gone."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from pathlib import Path

from mbridge_rl.core.errors import StoreError
from mbridge_rl.distributed.arena import SHARED_MEMORY
from mbridge_rl.distributed.locks import try_lock
from mbridge_rl.distributed.private_files import open_file
from mbridge_rl.sync.store.writer_lock import Holder

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_.]+")
_ABANDONED_SECONDS = 3600.0


def require_store_name(name: str) -> None:
    """Checks the name of a store.

    Raises:
        StoreError: the name cannot be part of a file name.
    """
    if not _NAME.fullmatch(name):
        raise StoreError(f"{name!r} cannot name a weight store: use letters, digits, '_' and '.'")


def remove_stale_stores(directory: Path = SHARED_MEMORY, older_than: float = _ABANDONED_SECONDS) -> list[Path]:
    """Removes this user's stores that have no writer: unnamed ones at once, others if nobody has written to them for
    `older_than` seconds; durable ones stay. The lock file of a store says of which kind it is.

    Returns:
        The paths that were unlinked.
    """
    removed: list[Path] = []
    for lock_path in directory.glob("mbridge_rl-store-*-users.lock"):
        files = list(directory.glob(f"{lock_path.name.removesuffix('users.lock')}*"))
        with contextlib.suppress(OSError, StoreError):  # it belongs to another user, or was removed meanwhile
            lock = open_file(lock_path, os.O_RDWR)
            try:
                if try_lock(lock) and _is_over(Holder.read(lock), files, older_than):
                    for path in files:
                        path.unlink(missing_ok=True)
                    removed += files
            finally:
                os.close(lock)
    if removed:
        logger.info("removed %d files of abandoned weight stores from %s", len(removed), directory)
    return removed


def _is_over(last_writer: Holder | None, files: list[Path], older_than: float) -> bool:
    kind = "named" if last_writer is None else last_writer.kind
    if kind == "named":
        return time.time() - max(path.stat().st_mtime for path in files) >= older_than
    return kind == "temporary"
