"""The transport `cuda_ipc`, for a trainer rank and an engine worker that share a GPU: the worker reads the buckets in the
trainer's GPU memory.

It follows PyTorch's contract for sharing CUDA storage between processes (`torch.multiprocessing.reductions`): a handle is
opened once and stays valid while its owner keeps the memory. Counters in shared memory say which buckets are full and which are
empty, as for the ring; both ends synchronize the device before they count. It is untested: the machine on which it was written
has no GPU.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbridge_rl.core.buckets import aligned
from mbridge_rl.core.errors import SyncError
from mbridge_rl.sync.payload.route import Part, Route, WorkerRoute
from mbridge_rl.sync.payload.wires import IpcWire
from mbridge_rl.sync.transports import Context, Outlet
from mbridge_rl.sync.transports.shared_memory import RING_BUCKETS, Ring, RingInlet, RingOutlet, RingTransport
from mbridge_rl.sync.transports.waiting import Timeout


def handle_of(tensor: Tensor) -> list[Any]:
    """The handle with which another process opens the tensor's storage, in JSON types."""
    fields = tensor.untyped_storage()._share_cuda_()
    return [base64.b64encode(field).decode() if isinstance(field, bytes) else field for field in fields]


def opened(handle: Sequence[Any]) -> Tensor:
    """Opens a handle of another process on the same GPU; returns the tensor (uint8) behind it."""
    fields = [base64.b64decode(field) if isinstance(field, str) else field for field in handle]
    torch.cuda._lazy_init()
    storage = torch.UntypedStorage._new_shared_cuda(*fields)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class IpcOutlet(RingOutlet):
    """Packs on the GPU; `cells[worker]` is uint8 `[RING_BUCKETS, largest part]`."""

    def __init__(self, rings: Sequence[Ring], cells: dict[int, Tensor], route: Route, timeout: Timeout) -> None:
        super().__init__(rings, route, timeout)
        self._cells = cells

    def place(self, worker: int, index: int, part: Part) -> Tensor:
        self.wait_for_room(worker, index)
        return self._cells[worker][index % RING_BUCKETS, : part.nbytes]

    def send(self, worker: int, index: int, part: Part) -> None:
        torch.cuda.synchronize()
        super().send(worker, index, part)


class IpcInlet(RingInlet):
    """Reads the buckets from the trainer ranks' GPU memory."""

    def __init__(self, wire: IpcWire, route: WorkerRoute, timeout: Timeout) -> None:
        super().__init__(wire, route, timeout)
        self._cells = {int(rank): opened(handle).view(RING_BUCKETS, -1) for rank, handle in wire.handles[route.rank].items()}

    def take(self, index: int) -> Sequence[Tensor]:
        self.wait_for_parts(index)
        parts = self._route.buckets[index].parts
        return [self._cells[part.source_rank][index % RING_BUCKETS, : part.nbytes] for part in parts]

    def give_back(self, index: int) -> None:
        torch.cuda.synchronize()
        super().give_back(index)

    def close(self) -> None:
        self._cells.clear()
        super().close()


class IpcTransport(RingTransport):
    """The trainer's end: counters in shared memory, buckets on the GPU."""

    def __init__(self, context: Context) -> None:
        if context.device.type != "cuda":
            raise SyncError("the transport 'cuda_ipc' needs parameters on a GPU; on a CPU use 'shared_memory'")
        super().__init__(context)
        self._cell_bytes = [0] * len(context.route.workers)
        largest: dict[int, int] = {}
        for worker, _, part in context.route.parts_of(context.group.rank):
            largest[worker.rank] = max(largest.get(worker.rank, 0), aligned(part.nbytes))
        self._cells = {
            worker: torch.empty(RING_BUCKETS, nbytes, dtype=torch.uint8, device=context.device)
            for worker, nbytes in largest.items()
        }
        own_handles = {worker: handle_of(cells) for worker, cells in self._cells.items()}
        handles_by_rank = context.group.gather_plain(own_handles)
        self._handles = [
            {str(rank): handles[worker.rank] for rank, handles in enumerate(handles_by_rank) if worker.rank in handles}
            for worker in context.route.workers
        ]

    def open(self, version: int, route: Route) -> tuple[IpcWire, Outlet]:
        wire, _ = super().open(version, route)
        outlet = IpcOutlet(self._rings, self._cells, route, self._context.timeout)
        fields = {field.name: getattr(wire, field.name) for field in dataclasses.fields(wire)}
        return IpcWire(**fields, handles=tuple(self._handles)), outlet
