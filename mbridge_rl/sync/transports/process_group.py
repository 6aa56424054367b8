"""The transport `process_group` sends messages from point to point over torch.distributed (gloo or NCCL). A process group of
its own spans trainer ranks and engine workers.

The first ranks of the group are the trainer's; then come the workers of the first replica, of the second one, and so on. A
trainer rank sends each part once, to the first replica; every replica forwards what it receives to the next one while it uses
it.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from mbridge_rl.core.buckets import aligned
from mbridge_rl.core.errors import SyncError, TransferTimeout
from mbridge_rl.distributed.rendezvous import LOOPBACK, GroupAddress, make_group, new_secret, own_address, serve_store
from mbridge_rl.sync.payload.route import Part, Route, WorkerRoute
from mbridge_rl.sync.payload.wires import GroupWire
from mbridge_rl.sync.transports import Context, Outlet
from mbridge_rl.sync.transports.waiting import Timeout

_DEPTH = 3  # messages under way per process
_MOST_JOINED = 16
_joined: dict[tuple[str, int], dist.ProcessGroup] = {}  # this process's process groups, by id and rank; they outlive a version


def join(address: GroupAddress, rank: int, seconds: float) -> dist.ProcessGroup:
    """Joins the process group of `address`.

    Raises:
        TransferTimeout: not all members came within `seconds`.
    """
    if (member := (address.group, rank)) in _joined:
        return _joined[member]
    with explained("cannot meet the trainer and the other workers"):
        group = make_group(address, rank, timedelta(seconds=seconds))
    while len(_joined) >= _MOST_JOINED:
        _joined.pop(next(iter(_joined)))  # its trainer is gone, or has made another group since
    _joined[member] = group
    return group


def leave(address: GroupAddress, rank: int) -> None:
    """Forgets the process group of `wire`, because it failed or is not needed any more."""
    _joined.pop((address.group, rank), None)


def device_of(address: GroupAddress) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if address.backend == "nccl" else torch.device("cpu")


class GroupOutlet:
    """A trainer rank's end. It joins the group when it sends for the first time; the workers join at the same time."""

    def __init__(self, wire: GroupWire, rank: int, largest: int, timeout: Timeout) -> None:
        self._wire, self._rank, self._timeout = wire, rank, timeout
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device_of(wire.address)) for _ in range(_DEPTH)]
        self._works: deque[dist.Work] = deque()
        self._sent = 0

    def place(self, worker: int, index: int, part: Part) -> Tensor:
        while len(self._works) >= _DEPTH:
            _wait(self._works.popleft(), self._timeout, f"worker {worker} did not take an earlier part")
        return self._buffers[self._sent % _DEPTH][: part.nbytes]

    def send(self, worker: int, index: int, part: Part) -> None:
        group = join(self._wire.address, self._rank, self._timeout.seconds)
        message = self._buffers[self._sent % _DEPTH][: part.nbytes]
        with explained(f"cannot send to worker {worker}"):
            self._works.append(group.send([message], self._wire.trainers + worker, index))
        self._sent += 1

    def finish(self) -> None:
        while self._works:
            _wait(self._works.popleft(), self._timeout, "a worker did not take a part")

    def fail(self) -> None:
        """Does nothing: the others notice at their time-out."""

    def close(self) -> None:
        self._works.clear()


class GroupInlet:
    """A worker's end. It receives from trainer ranks, or from the replica before its own."""

    def __init__(self, wire: GroupWire, route: WorkerRoute, timeout: Timeout) -> None:
        self._wire, self._route, self._timeout = wire, route, timeout
        first = wire.trainers + wire.replica * wire.workers
        self._before = first - wire.workers + route.rank if wire.replica else None
        self._after = first + wire.workers + route.rank if wire.replica + 1 < wire.replicas else None
        self._rank = first + route.rank
        self._group: dist.ProcessGroup | None = None
        size = aligned(route.bucket_bytes)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device_of(wire.address)) for _ in range(_DEPTH)]
        self._posted: deque[list[dist.Work]] = deque()
        self._forwarded: dict[int, list[dist.Work]] = {}
        self._next = 0

    def take(self, index: int) -> Sequence[Tensor]:
        if self._group is None:  # the trainer ranks join when they send
            self._group = join(self._wire.address, self._rank, self._timeout.seconds)
        while self._next < min(index + _DEPTH, len(self._route.buckets)):
            self._posted.append([self._receive(self._next, part, data) for part, data in self._parts(self._next)])
            self._next += 1
        for work, part in zip(self._posted.popleft(), self._route.buckets[index].parts, strict=True):
            _wait(work, self._timeout, f"trainer rank {part.source_rank} did not send bucket {index}")
        if self._after is not None:
            self._forwarded[index] = [self._group.send([data], self._after, index) for _, data in self._parts(index)]
        return [data for _, data in self._parts(index)]

    def give_back(self, index: int) -> None:
        for work in self._forwarded.pop(index, ()):
            _wait(work, self._timeout, f"the next replica did not take bucket {index}")

    def fail(self) -> None:
        """Does nothing: the others notice at their time-out."""

    def close(self) -> None:
        self._posted.clear()

    def _receive(self, index: int, part: Part, data: Tensor) -> dist.Work:
        with explained(f"cannot receive bucket {index}"):
            return self._group.recv([data], part.source_rank if self._before is None else self._before, index)

    def _parts(self, index: int) -> list[tuple[Part, Tensor]]:
        bucket, buffer = self._route.buckets[index], self._buffers[index % _DEPTH]
        return [(part, buffer[part.start - bucket.start :][: part.nbytes]) for part in bucket.parts]


class GroupTransport:
    """The trainer's end. A group that failed is replaced by another one at the next version.

    Args:
        context: what the transport needs to know.
        one_host: whether all members are on one host, so that the store where they meet need not be reachable from elsewhere.
    """

    def __init__(self, context: Context, *, one_host: bool = False) -> None:
        self._context, self._one_host = context, one_host
        self._server: dist.TCPStore | None = None
        self._wire: GroupWire | None = None

    def open(self, version: int, route: Route) -> tuple[GroupWire, Outlet]:
        """Describes the process group to the workers. All ranks call it together."""
        context = self._context
        if self._wire is None:
            if context.group.rank == 0 and self._server is None:
                self._server = serve_store(LOOPBACK if self._one_host else own_address())
            own_address_of_group = self._address() if self._server is not None else None
            address = context.group.share_plain(own_address_of_group, (GroupAddress,))
            self._wire = GroupWire(
                address=address,
                trainers=context.group.size,
                workers=len(context.route.workers),
                replicas=context.replicas,
            )
        largest = max((part.nbytes for _, _, part in context.route.parts_of(context.group.rank)), default=0)
        return self._wire, GroupOutlet(self._wire, context.group.rank, largest, context.timeout)

    def _address(self) -> GroupAddress:
        context = self._context
        assert self._server is not None
        return GroupAddress(
            host=self._server.host,
            port=self._server.port,
            group=secrets.token_hex(16),
            secret=new_secret(),
            backend="nccl" if context.device.type == "cuda" else "gloo",
            size=context.group.size + len(context.route.workers) * context.replicas,
        )

    def verify(self, with_digests: bool) -> None:
        """Does nothing: the workers verify."""

    def commit(self, version: int, digest: str | None, proofs: Sequence[str]) -> None:
        """Does nothing: the workers commit."""

    def abort(self) -> None:
        if self._wire is not None:
            leave(self._wire.address, self._context.group.rank)
        self._wire = None

    def close(self) -> None:
        self.abort()
        self._server = None


def _wait(work: dist.Work, timeout: Timeout, complaint: str) -> None:
    with explained(complaint):
        work.wait(timedelta(seconds=timeout.seconds))


class explained:
    """Turns an error of the backend into a `TransferTimeout` with a complaint that names the member which did not come."""

    def __init__(self, complaint: str) -> None:
        self._complaint = complaint

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, SyncError):
            raise TransferTimeout(f"{self._complaint} (the backend: {str(error).splitlines()[0]})") from error
