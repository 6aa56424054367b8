"""Transports carry buckets from trainer ranks to engine workers: one small file per transport, behind two small interfaces.

    outlet (a trainer rank):   place(worker, index, part) -> where to pack it;   send(worker, index, part);   finish() | fail()
    inlet (an engine worker):  take(index) -> its parts' bytes;                  give_back(index);            fail()

Packing part n + 1 overlaps with moving part n and loading part n - 1, as far as a transport has room for them. Every wait has a
time-out. The *wire* is the message that holds what a worker needs to open its inlet (`payload.wires`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mbridge_rl.core.errors import SyncError
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.sync.payload.route import Part, Route, WorkerRoute
from mbridge_rl.sync.payload.wires import FilesWire, GroupWire, IpcWire, RingWire, StoreWire, Wire
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.transports.waiting import Timeout


class Outlet(Protocol):
    """A trainer rank's end. Parts are placed and sent in the order of `Route.parts_of`."""

    def place(self, worker: int, index: int, part: Part) -> Tensor:
        """The memory in which to pack `part` of bucket `index`, uint8 `[part.nbytes]`; waits until there is room."""
        ...

    def send(self, worker: int, index: int, part: Part) -> None:
        """Sends the part, which has been packed."""
        ...

    def finish(self) -> None:
        """Returns when everything has left this rank."""
        ...

    def fail(self) -> None:
        """Ends sending after a failure, and lets the workers know at once if the transport can."""
        ...

    def close(self) -> None: ...


class Inlet(Protocol):
    """An engine worker's end. Buckets are taken in order."""

    def take(self, index: int) -> Sequence[Tensor]:
        """The bytes (uint8) of each part of bucket `index`, in the route's order; valid until the bucket is given back."""
        ...

    def give_back(self, index: int) -> None: ...

    def fail(self) -> None:
        """Ends receiving after a failure, and lets the trainer ranks know at once if the transport can."""
        ...

    def close(self) -> None: ...


@contextmanager
def fails_with(outlet: Outlet) -> Iterator[None]:
    """Calls `outlet.fail()` if the block raises, so that nobody waits for this rank."""
    try:
        yield
    except BaseException:
        outlet.fail()
        raise


@dataclass(frozen=True)
class Context:
    """What every transport needs to know of a sync, on a trainer rank.

    Attributes:
        group: the trainer ranks.
        route: what every engine worker receives.
        replicas: number of engines of equal layout that all get the same weights.
        store: the weight store of the trainer's host.
        timeout: the timeout of every wait.
        url: the directory or object store of the transport `files`.
        device: the device of the parameters.
    """

    group: RankGroup
    route: Route
    replicas: int
    store: WeightStore
    timeout: Timeout
    url: str | None
    device: torch.device

    def from_first_rank(self, value: Any) -> Any:
        """Rank 0's `value` on all ranks. It is small: a few paths, once per sync."""
        return self.group.share_plain(value)


class Transport(Protocol):
    """A trainer's end of a transport, on every rank. It is made once and used for every version."""

    def open(self, version: int, route: Route) -> tuple[Wire, Outlet]:
        """Opens the transfer of `version`. The parts of `route` are those of the context's route, or smaller."""
        ...

    def verify(self, with_digests: bool) -> None:
        """Verifies what this rank can verify of what was sent."""
        ...

    def commit(self, version: int, digest: str | None, proofs: Sequence[str]) -> None:
        """Makes `version` the committed one, on rank 0, before the engines commit it."""
        ...

    def abort(self) -> None:
        """Gives the transfer up that is open."""
        ...

    def close(self) -> None: ...


def open_transport(name: str, context: Context, *, one_host: bool = False) -> Transport:
    """Opens the trainer's end of a transport.

    Args:
        name: the name of the transport.
        context: what the transport needs to know.
        one_host: whether trainer and engines are all on one host.

    Raises:
        SyncError: there is no such transport.
    """
    from mbridge_rl.sync.transports import cuda_ipc, files, process_group, shared_memory

    transports: dict[str, Callable[[Context], Transport]] = {
        "store": shared_memory.StoreTransport,
        "shared_memory": shared_memory.RingTransport,
        "process_group": partial(process_group.GroupTransport, one_host=one_host),
        "files": files.FilesTransport,
        "cuda_ipc": cuda_ipc.IpcTransport,
    }
    if name not in transports:
        raise SyncError(f"there is no transport {name!r}; choose among {', '.join(transports)}")
    return transports[name](context)


def open_inlet(wire: Wire, route: WorkerRoute, timeout: Timeout) -> Inlet:
    """Opens the worker's end of the transport that the trainer opened.

    Raises:
        SyncError: this library does not know the transport.
    """
    from mbridge_rl.sync.transports import cuda_ipc, files, process_group, shared_memory

    inlets: dict[type[Wire], Callable[[Any, WorkerRoute, Timeout], Inlet]] = {
        StoreWire: shared_memory.SlotInlet,
        RingWire: shared_memory.RingInlet,
        GroupWire: process_group.GroupInlet,
        FilesWire: files.FilesInlet,
        IpcWire: cuda_ipc.IpcInlet,
    }
    if type(wire) not in inlets:
        raise SyncError(f"this engine knows no transport with the wire {type(wire).__name__}")
    return inlets[type(wire)](wire, route, timeout)
