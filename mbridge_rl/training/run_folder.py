"""The folder of a run while it is prepared."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mbridge_rl.training.config_file import ConfigError


@contextlib.contextmanager
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
