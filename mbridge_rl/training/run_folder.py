"""A run folder belongs to one run at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mbridge_rl.hf.lock import SaveLock
from mbridge_rl.training.config_file import ConfigError


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
