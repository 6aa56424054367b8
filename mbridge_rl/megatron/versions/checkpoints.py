"""Megatron's distributed checkpoints: who writes them, and where their common part is."""

from __future__ import annotations

import contextlib
import inspect
import queue
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_COMMON_FILE = "common.pt"


def save_asynchronously(content: dict[str, Any], directory: Path) -> Any:
    """The request of Megatron's own asynchronous writer, which then writes `content`; all ranks call it together.

    Since 0.17 the default writer is NVIDIA's resiliency extension, which starts processes of its own; the one of Megatron is
    asked for by name.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    # Megatron would start a process that holds the queue of results, and that process outlives a killed rank. No other process
    # needs the queue, so an ordinary one takes its place.
    filesystem_async._results_queue = queue.Queue()
    # One writer per rank: there are as many ranks as a machine has devices.
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    known = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    options = {"async_strategy": "mcore"} if known else {}
    return dist_checkpointing.save(content, str(directory), strategy, async_sharded_save=True, **options)


@contextlib.contextmanager
def forgetting_failed_writes() -> Iterator[None]:
    """Makes Megatron's writer free what a failed write held, at once; put it around the execution of a request.

    0.16 writes in a process of its own, and newer releases in this one. There a failed write returns its exception out of the
    frame that caught it, a cycle of exception, frame and the bytes that were being written. CPython 3.12.1 crashes when its
    garbage collector meets such a cycle of a `BytesIO` and a view of it; other releases keep the bytes until then.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    original = FileSystemWriterAsync.write_preloaded_data

    def write(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        failure = result[1] if isinstance(result, tuple) else None
        if isinstance(failure, BaseException):
            traceback.clear_frames(failure.__traceback__)
        return result

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
    try:
        yield
    finally:
        FileSystemWriterAsync.write_preloaded_data = staticmethod(original)


def write_common_file(common: dict[str, Any], directory: Path) -> None:
    """Writes the common part of a checkpoint, which is the same for all ranks, before Megatron saves the rest.

    0.16 to 0.18 write this file themselves and read nothing else. 0.19 stores a copy among the shards instead, but reads this
    file where it exists. So it is written here for all of them, and every release reads what any other wrote.
    """
    torch.save(common, directory / _COMMON_FILE)
