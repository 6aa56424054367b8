"""The trainer ranks of one transfer: the few collectives that a transfer needs, also where there is but one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mbridge_rl.sync.errors import SyncError


class RankGroup:
    """All trainer ranks, or this process alone where torch.distributed is not initialised."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._alone = not dist.is_initialized()
        on_gpu = not self._alone and "nccl" in dist.get_backend(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.rank = 0 if self._alone else dist.get_rank(group)
        self.size = 1 if self._alone else dist.get_world_size(group)

    def broadcast(self, payload: Tensor, source_rank: int) -> dist.Work | None:
        """Starts sending `payload` (uint8, the same size everywhere) from `source_rank` to all; wait on the result."""
        if self.size == 1:
            return None
        return dist.broadcast(payload, group_src=source_rank, group=self._group, async_op=True)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of int64 `values`, modulo 2^64; also a barrier."""
        if self.size == 1:
            return values
        summed = values.to(self.device)
        dist.all_reduce(summed, group=self._group)
        return summed.cpu()

    def barrier(self) -> None:
        self.sum(torch.zeros(1, dtype=torch.int64))

    def first_rank_does(self, action: Callable[[], None]) -> None:
        """Runs `action` on rank 0; every rank returns when it is done, or raises what it raised.

        Raises:
            SyncError: on the other ranks, where rank 0 failed.
        """
        failure: Exception | None = None
        if self.rank == 0:
            try:
                action()
            except Exception as error:  # told to the other ranks before it goes on, so that none of them waits for a time-out
                failure = error
        failed = self.sum(torch.tensor([int(failure is not None)]))
        if failure is not None:
            self.gather_object(f"{type(failure).__name__}: {failure}")
            raise failure
        if failed.item():
            raise SyncError(f"rank {self.rank}: rank 0 failed: {self.gather_object(None)[0]}")

    def gather_object(self, value: Any) -> list[Any]:
        """Every rank's `value`. For the one-time handshake and for failures only, never for payload."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values
