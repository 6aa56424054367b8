"""How buckets travel: one small file per transport, behind two small interfaces.

    outlet (a trainer rank):   place(worker, index, part) -> where to pack it;   send(worker, index, part);   finish() | fail()
    inlet (an engine worker):  take(index) -> its parts' bytes;                  give_back(index);            fail()

Packing part n + 1 overlaps with moving part n and loading part n - 1, as far as a transport has room for them. Every wait has a
time-out. The *wire* is what a worker needs to open its inlet, in plain JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mbridge_rl.core.errors import SyncError
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.sync.payload.route import Part, Route, WorkerRoute
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.transports.waiting import Timeout

Wire = Mapping[str, Any]


class Outlet(Protocol):
    """A trainer rank's end; parts are placed and sent in the order of `Route.parts_of`."""

    def place(self, worker: int, index: int, part: Part) -> Tensor:
        """Where to pack `part` of bucket `index`, uint8 `[part.nbytes]`; waits until there is room."""
        ...

    def send(self, worker: int, index: int, part: Part) -> None:
        """The part is packed."""
        ...

    def finish(self) -> None:
        """Returns when everything has left this rank."""
        ...

    def fail(self) -> None:
        """This rank sends no more; whoever waits for it should not have to find out."""
        ...

    def close(self) -> None: ...


class Inlet(Protocol):
    """An engine worker's end; buckets are taken in order."""

    def take(self, index: int) -> Sequence[Tensor]:
        """The bytes of each part of bucket `index`, in the route's order; valid until it is given back."""
        ...

    def give_back(self, index: int) -> None: ...

    def fail(self) -> None:
        """This worker takes no more; whoever waits for it should not have to find out."""
        ...

    def close(self) -> None: ...


@contextmanager
def fails_with(outlet: Outlet) -> Iterator[None]:
    """Whoever waits for this rank hears of it when something is raised inside."""
    try:
        yield
    except BaseException:
        outlet.fail()
        raise


@dataclass(frozen=True)
class Context:
    """What every way needs to know of a sync, on a trainer rank.

    Attributes:
        replicas: engines of equal layout that all get the same weights.
        store: the weight store of the trainer's host.
        timeout: for every wait.
        url: where files go.
        device: of the parameters.
    """

    group: RankGroup
    route: Route
    replicas: int
    store: WeightStore
    timeout: Timeout
    url: str | None
    device: torch.device

    def from_first_rank(self, value: Any) -> Any:
        """Rank 0's `value` on all ranks: a few paths, once per sync."""
        return self.group.share_plain(value)


class Way(Protocol):
    """A trainer's end of a transport, on every rank; made once, used for every version."""

    def open(self, version: int, route: Route) -> tuple[Wire, Outlet]:
        """`route` is the context's, with parts of their size or smaller ones."""
        ...

    def verify(self, with_digests: bool) -> None: ...

    def commit(self, version: int, digest: str | None, proofs: Sequence[str]) -> None: ...

    def abandon(self) -> None: ...

    def close(self) -> None: ...


def open_way(kind: str, context: Context, *, one_host: bool = False) -> Way:
    """The trainer's end of a transport.

    Args:
        one_host: trainer and engines are all on one.

    Raises:
        SyncError: there is no such kind.
    """
    from mbridge_rl.sync.transports import cuda_ipc, files, process_group, shared_memory

    kinds: dict[str, Callable[[Context], Way]] = {
        "store": shared_memory.StoreWay,
        "shared_memory": shared_memory.RingWay,
        "process_group": partial(process_group.GroupWay, one_host=one_host),
        "files": files.FilesWay,
        "cuda_ipc": cuda_ipc.IpcWay,
    }
    if kind not in kinds:
        raise SyncError(f"there is no transport {kind!r}; choose among {', '.join(kinds)}")
    return kinds[kind](context)


def open_inlet(wire: Wire, route: WorkerRoute, timeout: Timeout) -> Inlet:
    """The worker's end of whatever the trainer opened.

    Raises:
        SyncError: a kind of wire that this library does not know.
    """
    from mbridge_rl.sync.transports import cuda_ipc, files, process_group, shared_memory

    kinds = {
        "store": shared_memory.SlotInlet,
        "shared_memory": shared_memory.RingInlet,
        "process_group": process_group.GroupInlet,
        "files": files.FilesInlet,
        "cuda_ipc": cuda_ipc.IpcInlet,
    }
    if wire["kind"] not in kinds:
        raise SyncError(f"this engine knows no transport {wire['kind']!r}; is the trainer's mbridge_rl newer?")
    return kinds[wire["kind"]](wire, route, timeout)
