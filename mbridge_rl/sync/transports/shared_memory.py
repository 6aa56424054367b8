"""Through shared memory, on one host: into a slot of the weight store, or through a ring of buckets that needs little memory.

A ring holds a few buckets per worker. Each trainer rank counts what it has filled, the worker counts what it has emptied; each
number has one writer, so there is nothing to lock. Whoever fails says so in its own number, and whoever waits hears of it at
once; a peer that died says nothing, and whoever waits for it runs into the time-out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mbridge_rl.core.buckets import aligned
from mbridge_rl.sync import packing
from mbridge_rl.sync.arena import Arena
from mbridge_rl.sync.errors import PeerFailed
from mbridge_rl.sync.route import Part, Route, WorkerRoute
from mbridge_rl.sync.store import Slot, WeightStore
from mbridge_rl.sync.transports import Context, Outlet, Wire
from mbridge_rl.sync.waiting import Patience

RING_BUCKETS = 3  # one is packed, one is full, one is loaded
_LINE = 64  # bytes between counters: writers of neighbours do not share a cache line
_FAILED = -1  # the count of one who takes part no longer


class SlotOutlet:
    """Packs straight into the idle slot of the node's weight store."""

    def __init__(self, slot: Slot) -> None:
        self._arenas = slot.open()

    def place(self, worker: int, index: int, part: Part) -> Tensor:
        return self._arenas[worker].view(part.start, (part.nbytes,), torch.uint8)

    def send(self, worker: int, index: int, part: Part) -> None:
        """Nothing moves."""

    def finish(self) -> None:
        """It is there."""

    def fail(self) -> None:
        """Nobody waits."""

    def image(self, worker: int) -> Tensor:
        """The whole image of `worker`, also of what other ranks wrote."""
        return self._arenas[worker].view(0, (self._arenas[worker].nbytes,), torch.uint8)

    def close(self) -> None:
        for arena in self._arenas:
            arena.close()


class SlotInlet:
    """Reads the live slot, which is complete by then."""

    def __init__(self, wire: Wire, route: WorkerRoute, patience: Patience) -> None:
        self._route = route
        self._reading = WeightStore(wire["name"], wire["directory"]).read(route.rank, wire["token"])

    def take(self, index: int) -> Sequence[Tensor]:
        parts = self._route.buckets[index].parts
        return [self._reading.image[part.start : part.start + part.nbytes] for part in parts]

    def give_back(self, index: int) -> None:
        """It stays."""

    def fail(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        self._reading.close()


class Ring:
    """The memory of one worker's ring: `[filled by rank 0, ..., emptied by replica 0, ...][buckets]`.

    Args:
        sources: number of trainer ranks.
        replicas: number of engines that each read every bucket.
    """

    def __init__(self, arena: Arena, sources: int, replicas: int, cell_bytes: int) -> None:
        self._arena, self._sources, self._replicas, self._cell_bytes = arena, sources, replicas, cell_bytes
        self._head = aligned((sources + replicas) * _LINE)
        self._counters = arena.view(0, (self._head // 8,), torch.int64).numpy()[:: _LINE // 8]

    @staticmethod
    def nbytes(sources: int, replicas: int, cell_bytes: int) -> int:
        return aligned((sources + replicas) * _LINE) + RING_BUCKETS * cell_bytes

    def cell(self, index: int, start: int, nbytes: int) -> Tensor:
        """Bytes `[start, start + nbytes)` of bucket `index`."""
        return self._arena.view(self._head + index % RING_BUCKETS * self._cell_bytes + start, (nbytes,), torch.uint8)

    def filled(self, source: int) -> int:
        """The last bucket that `source` has filled, plus one."""
        return int(self._counters[source])

    def emptied(self) -> int:
        """The last bucket that all replicas have emptied, plus one."""
        return int(self._counters[self._sources : self._sources + self._replicas].min())

    def set_filled(self, source: int, count: int) -> None:
        self._counters[source] = count

    def set_emptied(self, replica: int, count: int) -> None:
        self._counters[self._sources + replica] = count

    def source_failed(self, source: int) -> None:
        self._counters[source] = _FAILED

    def replica_failed(self, replica: int) -> None:
        self._counters[self._sources + replica] = _FAILED

    def require_sources(self) -> None:
        """
        Raises:
            PeerFailed: one of the trainer ranks failed.
        """
        for source in range(self._sources):
            if self._counters[source] == _FAILED:
                raise PeerFailed(f"trainer rank {source} failed, and sends no more")

    def require_replicas(self, worker: int) -> None:
        """
        Raises:
            PeerFailed: one of the replicas of `worker`, whose ring this is, failed.
        """
        for replica in range(self._replicas):
            if self._counters[self._sources + replica] == _FAILED:
                raise PeerFailed(f"worker {worker} of engine {replica} failed, and takes no more")


class RingOutlet:
    """A trainer rank at the rings of all workers."""

    def __init__(self, rings: Sequence[Ring], route: Route, rank: int, patience: Patience) -> None:
        self._rings, self._route, self._rank, self._patience = rings, route, rank, patience

    def place(self, worker: int, index: int, part: Part) -> Tensor:
        self.wait_for_room(worker, index)
        return self._rings[worker].cell(index, part.start - self._route.workers[worker].buckets[index].start, part.nbytes)

    def wait_for_room(self, worker: int, index: int) -> None:
        ring, free = self._rings[worker], index - RING_BUCKETS
        self._patience.wait_for(lambda: ring.emptied() > free, f"worker {worker} did not empty bucket {free}", self._look)

    def send(self, worker: int, index: int, part: Part) -> None:
        self._rings[worker].set_filled(self._rank, index + 1)

    def finish(self) -> None:
        """The worker empties the rest on its own."""

    def fail(self) -> None:
        for ring in self._rings:
            ring.source_failed(self._rank)

    def close(self) -> None:
        """The rings are the way's."""

    def _look(self) -> None:
        for worker, ring in enumerate(self._rings):
            ring.require_replicas(worker)
            ring.require_sources()


class RingInlet:
    """A worker at its ring."""

    def __init__(self, wire: Wire, route: WorkerRoute, patience: Patience) -> None:
        self._route, self._patience, self._replica = route, patience, wire["replica"]
        sizes = wire["sources"], wire["replicas"], wire["cell_bytes"][route.rank]
        self._arena = Arena.attach(wire["paths"][route.rank], Ring.nbytes(*sizes), writable=True)
        self._ring = Ring(self._arena, *sizes)

    def take(self, index: int) -> Sequence[Tensor]:
        bucket = self._route.buckets[index]
        self.wait_for_parts(index)
        return [self._ring.cell(index, part.start - bucket.start, part.nbytes) for part in bucket.parts]

    def wait_for_parts(self, index: int) -> None:
        for part in self._route.buckets[index].parts:
            rank = part.source_rank
            complaint = f"trainer rank {rank} did not send bucket {index}"
            self._patience.wait_for(lambda rank=rank: self._ring.filled(rank) > index, complaint, self._ring.require_sources)

    def give_back(self, index: int) -> None:
        self._ring.set_emptied(self._replica, index + 1)

    def fail(self) -> None:
        self._ring.replica_failed(self._replica)

    def close(self) -> None:
        self._arena.close()


class StoreWay:
    """The trainer's end of the weight store: every rank packs into the idle slot, and verifies its share of what all packed."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._store = context.store
        self._slot: Slot | None = None
        self._outlet: SlotOutlet | None = None
        self._opened: dict[str, SlotOutlet] = {}

    def open(self, version: int, route: Route) -> tuple[Wire, Outlet]:
        """All ranks together."""
        context, sizes = self._context, [worker.nbytes for worker in self._context.route.workers]
        made: list[Slot] = []
        context.group.first_rank_does(lambda: made.append(self._store.begin(sizes)))
        token, paths = context.from_first_rank((made[0].token, made[0].paths) if made else None)
        self._slot = made[0] if made else Slot(token, paths, tuple(sizes), [])
        with context.group.together():
            if token not in self._opened:
                self._close_outlets(keep=1)
                self._opened[token] = SlotOutlet(self._slot)
        self._outlet = self._opened[token]
        wire = {"kind": "store", "name": self._store.name, "directory": str(self._store.directory), "token": token}
        return wire, self._outlet

    def verify(self, with_digests: bool) -> None:
        """This rank's share of the images: computed anew, against what the ranks said that they packed.

        Raises:
            DigestMismatch: naming the tensors.
        """
        assert self._outlet is not None
        if not with_digests:
            return
        for worker in self._context.route.workers[self._context.group.rank :: self._context.group.size]:
            packing.require_expected(worker, self._outlet.image(worker.rank))

    def commit(self, version: int, digest: str | None) -> None:
        """The decision: from here on this version is the live one. Rank 0 alone."""
        assert self._slot is not None
        self._store.commit(self._slot, version, self._context.route.fingerprint, digest)

    def abandon(self) -> None:
        if self._slot is not None:
            self._store.abandon(self._slot)

    def close(self) -> None:
        self.abandon()
        self._close_outlets(keep=0)

    def _close_outlets(self, keep: int) -> None:
        while len(self._opened) > keep:
            self._opened.pop(next(iter(self._opened))).close()


class RingWay:
    """The trainer's end of rings of buckets in shared memory."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._cell_bytes = [worker.bucket_bytes for worker in context.route.workers]
        self._arenas: list[Arena] = []

    def open(self, version: int, route: Route) -> tuple[Wire, Outlet]:
        """All ranks together. Every version gets counters that start at zero."""
        context = self._context
        sizes = [(context.group.size, context.replicas, cell_bytes) for cell_bytes in self._cell_bytes]
        with context.group.together():
            if not self._arenas and context.group.rank == 0:
                self._arenas = [Arena.create(Ring.nbytes(*size)) for size in sizes]
            for arena, (sources, replicas, _) in zip(self._arenas if context.group.rank == 0 else [], sizes, strict=False):
                arena.view(0, (aligned((sources + replicas) * _LINE),), torch.uint8).zero_()
        paths = context.from_first_rank([arena.path for arena in self._arenas])
        with context.group.together():
            if [arena.path for arena in self._arenas] != paths:
                self._arenas = [
                    Arena.attach(path, Ring.nbytes(*size), writable=True) for path, size in zip(paths, sizes, strict=True)
                ]
        rings = [Ring(arena, *size) for arena, size in zip(self._arenas, sizes, strict=True)]
        wire = {
            "kind": "shared_memory",
            "paths": paths,
            "sources": context.group.size,
            "replicas": context.replicas,
            "cell_bytes": self._cell_bytes,
        }
        return wire, RingOutlet(rings, route, context.group.rank, context.patience)

    def verify(self, with_digests: bool) -> None:
        """The workers do, from their live weights."""

    def commit(self, version: int, digest: str | None) -> None:
        """The workers hold it already."""

    def abandon(self) -> None:
        """A straggler may still write to these rings; the next version gets others."""
        self.close()

    def close(self) -> None:
        while self._arenas:
            self._arenas.pop().close()
