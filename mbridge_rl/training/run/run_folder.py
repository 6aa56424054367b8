"""A run's folder: it belongs to one run at a time, and a run that cannot be prepared leaves none behind."""

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
    """Raises RunExists while another process runs in this folder."""
    run_dir = run_dir.resolve()
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = SaveLock(run_dir.with_name(f".{run_dir.name}.run.lock"), run_dir)
    if not lock.try_acquire():
        who, advice = lock.holder()
        raise RunExists(f"{run_dir}: {who} is running in this folder; {advice}, or set another run_dir")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_run_folder(folder: Path) -> Iterator[None]:
    """Makes the run folder. One that was not there is gone again where the run cannot be prepared in it.

    Raises:
        ConfigError: it cannot be made.
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
