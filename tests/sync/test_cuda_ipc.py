"""CUDA IPC between two processes on one GPU."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch

from mbridge_rl.sync.transports.cuda_ipc import handle_of, opened

pytestmark = pytest.mark.gpu


def _read(handle: list[Any], queue: Any) -> None:
    queue.put(opened(handle)[:5].tolist())
    torch.cuda.synchronize()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_another_process_reads_what_lies_on_the_gpu() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    tensor = torch.arange(1 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    reader = context.Process(target=_read, args=(handle_of(tensor), queue))
    reader.start()
    assert queue.get(timeout=60) == [0, 1, 2, 3, 4]
    reader.join(60)
    assert reader.exitcode == 0
