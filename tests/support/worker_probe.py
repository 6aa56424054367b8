"""Imported by vLLM in each worker (`worker_extension_cls`): notes the largest tensor that the worker makes while it receives,
writes and proves an update, in the folder that the environment names. What the engine then derives from its weights is its own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allocations import LargestAllocation

from mbridge_rl.sync.worker import update

VARIABLE = "MBRIDGE_TEST_PROBE"


class Probe:
    """vLLM mixes it into its worker."""


def largest(folder: Path) -> dict[str, int]:
    """The largest number of bytes that each process has noted since the last call."""
    sizes = {path.name: max(map(int, path.read_text().split())) for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    return sizes


def _noted(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any) -> Any:
        with LargestAllocation() as largest:
            try:
                return method(*args)
            finally:
                with (Path(os.environ[VARIABLE]) / str(os.getpid())).open("a") as file:
                    file.write(f"{largest.nbytes}\n")

    return call


if VARIABLE in os.environ:
    for step in ("_guarded", "load_staged", "prove"):  # the first in a thread of its own
        setattr(update.Update, step, _noted(getattr(update.Update, step)))
