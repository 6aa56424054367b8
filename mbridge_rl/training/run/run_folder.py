"""A run's folder: it belongs to one run at a time, and a run that cannot be prepared leaves no new folder behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mbridge_rl.hf.lock import SaveLock
from mbridge_rl.training.run.config_file import ConfigError


class RunExists(ConfigError):
    """The run folder holds a run already."""


@contextmanager
def only_run(run_dir: Path) -> Iterator[None]:
    """Locks the folder for the time of the block.

    Raises:
        RunExists: another process runs in this folder.
    """
    run_dir = run_dir.resolve()
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = SaveLock(run_dir.with_name(f".{run_dir.name}.run.lock"), run_dir)
    if not lock.try_acquire():
        holder, advice = lock.holder()
        raise RunExists(f"{run_dir}: {holder} is running in this folder; {advice}, or set another run_dir")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_run_folder(folder: Path) -> Iterator[None]:
    """Makes the run folder. If the block raises, a folder that did not exist before is removed again.

    Raises:
        ConfigError: the folder cannot be made.
    """
    is_new = not os.path.lexists(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir: {folder} must be a directory, or a place for one: {error.strerror or error}") from error
    try:
        yield
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
