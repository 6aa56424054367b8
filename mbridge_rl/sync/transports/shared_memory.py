"""The transport `shared_memory`, on one host: into a slot of the weight store, or through a ring of buckets, which needs little
memory.

A ring holds a few buckets per worker. Each trainer rank counts the buckets that it has filled, and the worker counts those that
it has emptied. Each counter has one writer, so nobody waits for a lock. The writer holds a file lock on its counter for as long
as it takes part: it releases the lock when it fails, and the kernel releases it when the process is killed. Whoever waits for
the counter checks the lock and so learns of the failure at once. A count has the random number of its update in its upper half,
so a late count for another update counts as nothing.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mbridge_rl.core.buckets import aligned
from mbridge_rl.core.errors import ArenaError, PeerFailed, StoreError
from mbridge_rl.distributed.arena import Arena
from mbridge_rl.distributed.locks import keep, release
from mbridge_rl.distributed.private_files import open_file
from mbridge_rl.sync.payload import packing
from mbridge_rl.sync.payload.route import Part, Route, WorkerRoute
from mbridge_rl.sync.payload.wires import RingWire, StoreWire
from mbridge_rl.sync.store.image import Label
from mbridge_rl.sync.store.weight_store import Slot, WeightStore
from mbridge_rl.sync.transports import Context, Outlet
from mbridge_rl.sync.transports.waiting import Timeout

RING_BUCKETS = 3  # one is packed, one is full, one is loaded
_LINE = 64  # bytes between counters: writers of neighbours do not share a cache line
_FLOCK = struct.Struct("hhqqi4x")  # C's: type, whence, start, length, pid
_COUNT_BITS = 32


class SlotOutlet:
    """Packs straight into the idle slot of the host's weight store."""

    def __init__(self, slot: Slot) -> None:
        self._arenas = slot.open()

    def require_fill(self, fill: str) -> None:
        """Checks that the slot has the fill which the first rank began.

        Raises:
            StoreError: it has another fill.
        """
        for arena in self._arenas:
            if (label := Label.of(arena)).fill != fill:
                raise StoreError(f"{arena.path} has fill {label.fill}, the first trainer rank began fill {fill}")

    def place(self, worker: int, index: int, part: Part) -> Tensor:
        return self._arenas[worker].view(part.start, (part.nbytes,), torch.uint8)

    def send(self, worker: int, index: int, part: Part) -> None:
        """Does nothing: the part was packed in its place."""

    def finish(self) -> None:
        """Does nothing: the parts are in their places."""

    def fail(self) -> None:
        """Does nothing: nobody waits for this outlet."""

    def image(self, worker: int) -> Tensor:
        """The complete image of `worker` (uint8), with the parts that other ranks wrote."""
        return self._arenas[worker].view(0, (self._arenas[worker].nbytes,), torch.uint8)

    def close(self) -> None:
        for arena in self._arenas:
            arena.close()


class SlotInlet:
    """Reads the live slot, which is complete. Nobody fills the slot anew until the inlet is closed."""

    def __init__(self, wire: StoreWire, route: WorkerRoute, timeout: Timeout) -> None:
        self._route = route
        self._reading = WeightStore(wire.name, wire.directory).read(route.rank, wire.fill)

    def require_version(self, version: int, *, verify: bool, again: bool) -> None:
        """Checks that the image which was opened is the version that this worker has to load.

        Args:
            version: the expected version.
            verify: compare the digests in the image with the proof in the head.
            again: also compare the bytes of the image with these digests, which reads all of them once.

        Raises:
            StoreError: it is another version. DigestMismatch: it was damaged.
        """
        head, worker = self._reading.head, self._route.rank
        if head.version != version:
            raise StoreError(f"fill {head.fill} of the weight store is version {head.version}, expected version {version}")
        if not verify:
            return
        if head.proofs is not None:
            packing.require_proof(self._route, self._reading.image, version, head.proofs[worker])
        if again:
            packing.require_expected(self._route, self._reading.image)

    def require_same(self) -> None:
        """Calls `Reading.require_same`."""
        self._reading.require_same()

    def take(self, index: int) -> Sequence[Tensor]:
        parts = self._route.buckets[index].parts
        return [self._reading.image[part.start : part.start + part.nbytes] for part in parts]

    def give_back(self, index: int) -> None:
        """Does nothing: the image stays."""

    def fail(self) -> None:
        """Does nothing: nobody waits for this inlet."""

    def close(self) -> None:
        self._reading.close()


class Ring:
    """One worker's ring, as one of its participants uses it.

    The arena holds the counters `[filled by rank 0, ..., emptied by replica 0, ...]` and then the buckets. The locks are those
    of open file descriptions: they belong to the file, whatever the pid namespaces are, and work within one process, too.

    Args:
        arena: the shared memory of the ring.
        sources: number of trainer ranks.
        replicas: number of engines that each read every bucket.
        cell_bytes: bytes of the largest bucket.
        own_counter: index of the counter that this participant writes, in the order above.
        update: random number of the update.
    """

    def __init__(self, arena: Arena, sources: int, replicas: int, cell_bytes: int, own_counter: int, update: int = 0) -> None:
        self.path = arena.path
        self._arena, self._sources, self._cell_bytes = arena, sources, cell_bytes
        self._own_counter, self._update = own_counter, update
        self._head = arena.view(0, (aligned((sources + replicas) * _LINE),), torch.uint8)
        self._counters = self._head.view(torch.int64).numpy()[:: _LINE // 8][: sources + replicas]
        self._file = keep(open_file(Path(arena.path), error_type=ArenaError))
        self._is_open = True
        self._lock(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, own_counter)

    @staticmethod
    def nbytes(sources: int, replicas: int, cell_bytes: int) -> int:
        return aligned((sources + replicas) * _LINE) + RING_BUCKETS * cell_bytes

    @staticmethod
    def new_update() -> int:
        """A random number that fits into the upper half of a count."""
        return secrets.randbits(63 - _COUNT_BITS)

    def turn_to(self, update: int) -> None:
        """Begins another update, for which nothing was counted yet."""
        self._update = update

    def start_anew(self) -> None:
        """Sets all counters to zero."""
        self._head.zero_()

    def cell(self, index: int, start: int, nbytes: int) -> Tensor:
        """Bytes `[start, start + nbytes)` of bucket `index`."""
        return self._arena.view(len(self._head) + index % RING_BUCKETS * self._cell_bytes + start, (nbytes,), torch.uint8)

    def count(self, buckets: int) -> None:
        """Sets how many buckets this participant has filled or emptied."""
        self._counters[self._own_counter] = self._update << _COUNT_BITS | buckets

    def filled(self, source: int) -> int:
        """The last bucket that `source` has filled, plus one."""
        return self._counted(source)

    def emptied(self) -> int:
        """The last bucket that all replicas have emptied, plus one."""
        return min(map(self._counted, range(self._sources, len(self._counters))))

    def require_filling(self, source: int, index: int) -> None:
        """Checks that trainer rank `source` may still fill bucket `index`.

        Raises:
            PeerFailed: it failed or died before.
        """
        if self._left_before(source, index):
            raise PeerFailed(f"trainer rank {source} failed or died: it did not send bucket {index}")

    def require_emptying(self, worker: int, index: int) -> None:
        """Checks that all replicas of `worker`, whose ring this is, may still empty bucket `index`.

        Raises:
            PeerFailed: one of them failed or died before.
        """
        for number in range(self._sources, len(self._counters)):
            if self._left_before(number, index):
                raise PeerFailed(
                    f"worker {worker} of engine {number - self._sources} failed or died: it did not empty bucket {index}"
                )

    def leave(self) -> None:
        """Releases the lock of this participant: who waits for more than it has counted learns that it never comes."""
        self._lock(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, self._own_counter)  # a forked child may keep the file open after `close`

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self.leave()
            release(self._file)
        self._arena.close()

    def _counted(self, number: int) -> int:
        update, buckets = divmod(int(self._counters[number]), 1 << _COUNT_BITS)
        return buckets if update == self._update else 0

    def _left_before(self, number: int, index: int) -> bool:
        """Whether the writer of a counter left before it counted bucket `index`."""
        held_kind = self._lock(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, number)
        return held_kind == fcntl.F_UNLCK and self._counted(number) <= index  # in this order: the last count is final now

    def _lock(self, command: int, kind: int, number: int) -> int:
        """Runs a lock command on a counter; a query returns the kind of the lock that is in the way."""
        flock = fcntl.fcntl(self._file, command, _FLOCK.pack(kind, os.SEEK_SET, number * _LINE, 1, 0))
        return _FLOCK.unpack(flock)[0]


class RingOutlet:
    """A trainer rank's end: the rings of all workers."""

    def __init__(self, rings: Sequence[Ring], route: Route, timeout: Timeout) -> None:
        self._rings, self._route, self._timeout = rings, route, timeout

    def place(self, worker: int, index: int, part: Part) -> Tensor:
        self.wait_for_room(worker, index)
        return self._rings[worker].cell(index, part.start - self._route.workers[worker].buckets[index].start, part.nbytes)

    def wait_for_room(self, worker: int, index: int) -> None:
        ring, free = self._rings[worker], index - RING_BUCKETS
        complaint = f"worker {worker} did not empty bucket {free}"
        self._timeout.wait_for(lambda: ring.emptied() > free, complaint, lambda: ring.require_emptying(worker, free))

    def send(self, worker: int, index: int, part: Part) -> None:
        self._rings[worker].count(index + 1)

    def finish(self) -> None:
        """Does nothing: the workers empty the remaining buckets on their own."""

    def fail(self) -> None:
        for ring in self._rings:
            ring.leave()

    def close(self) -> None:
        """Does nothing: the rings belong to the trainer's end of the transport."""


class RingInlet:
    """A worker's end: its ring."""

    def __init__(self, wire: RingWire, route: WorkerRoute, timeout: Timeout) -> None:
        self._route, self._timeout = route, timeout
        sizes = wire.sources, wire.replicas, wire.cell_bytes[route.rank]
        arena = Arena.attach(wire.paths[route.rank], Ring.nbytes(*sizes), writable=True)
        self._ring = Ring(arena, *sizes, own_counter=wire.sources + wire.replica, update=wire.update)

    def take(self, index: int) -> Sequence[Tensor]:
        bucket = self._route.buckets[index]
        self.wait_for_parts(index)
        return [self._ring.cell(index, part.start - bucket.start, part.nbytes) for part in bucket.parts]

    def wait_for_parts(self, index: int) -> None:
        for part in self._route.buckets[index].parts:
            self._wait_for(part.source_rank, index)

    def _wait_for(self, rank: int, index: int) -> None:
        ring, complaint = self._ring, f"trainer rank {rank} did not send bucket {index}"
        self._timeout.wait_for(lambda: ring.filled(rank) > index, complaint, lambda: ring.require_filling(rank, index))

    def give_back(self, index: int) -> None:
        self._ring.count(index + 1)

    def fail(self) -> None:
        self._ring.leave()

    def close(self) -> None:
        self._ring.close()


def store_wire(store: WeightStore, token: str, fill: str, *, committed: bool = False) -> StoreWire:
    """The wire with which a worker finds a fill of a slot."""
    return StoreWire(name=store.name, directory=str(store.directory), token=token, fill=fill, committed=committed)


class StoreTransport:
    """The trainer's end of the weight store: every rank packs into the idle slot, and verifies its share of the images."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._store = context.store
        self._slot: Slot | None = None
        self._outlet: SlotOutlet | None = None
        self._opened: dict[str, SlotOutlet] = {}

    def open(self, version: int, route: Route) -> tuple[StoreWire, Outlet]:
        """Begins a fill of the idle slot. All ranks call it together."""
        context, sizes = self._context, [worker.nbytes for worker in self._context.route.workers]
        slot = context.group.first_rank_does(lambda: self._store.begin(sizes))
        token, fill, paths = context.from_first_rank(None if slot is None else (slot.token, slot.fill, slot.paths))
        self._slot = Slot(token, fill, paths, tuple(sizes), []) if slot is None else slot
        with context.group.fail_together():
            if token not in self._opened:
                self._close_outlets(keep=1)
                self._opened[token] = SlotOutlet(self._slot)
            self._opened[token].require_fill(fill)
        self._outlet = self._opened[token]
        return store_wire(self._store, token, fill), self._outlet

    def verify(self, with_digests: bool) -> None:
        """Compares the bytes of this rank's share of the images with the digests that the ranks wrote into them.

        Raises:
            DigestMismatch: they differ; names the tensors.
        """
        assert self._outlet is not None
        if not with_digests:
            return
        for worker in self._context.route.workers[self._context.group.rank :: self._context.group.size]:
            packing.require_expected(worker, self._outlet.image(worker.rank))

    def commit(self, version: int, digest: str | None, proofs: Sequence[str]) -> None:
        """Makes this version the live one of the store. On rank 0 alone."""
        assert self._slot is not None
        self._store.commit(self._slot, version, self._context.route.fingerprint, digest, proofs or None)

    def abort(self) -> None:
        if self._slot is not None:
            self._store.abort(self._slot)

    def close(self) -> None:
        self.abort()
        self._close_outlets(keep=0)

    def _close_outlets(self, keep: int) -> None:
        while len(self._opened) > keep:
            self._opened.pop(next(iter(self._opened))).close()


class RingTransport:
    """The trainer's end of rings of buckets in shared memory."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._cell_bytes = [worker.bucket_bytes for worker in context.route.workers]
        self._rings: list[Ring] = []

    def open(self, version: int, route: Route) -> tuple[RingWire, Outlet]:
        """Sets the counters of all rings to zero for this version. All ranks call it together."""
        context, rank = self._context, self._context.group.rank
        sizes = [(context.group.size, context.replicas, cell_bytes) for cell_bytes in self._cell_bytes]
        with context.group.fail_together():
            if not self._rings and rank == 0:
                self._rings = [Ring(Arena.create(Ring.nbytes(*size)), *size, own_counter=0) for size in sizes]
            for ring in self._rings if rank == 0 else ():
                ring.start_anew()
        paths, update = context.from_first_rank(([ring.path for ring in self._rings], Ring.new_update()))
        with context.group.fail_together():
            if [ring.path for ring in self._rings] != paths:
                arenas = [
                    Arena.attach(path, Ring.nbytes(*size), writable=True) for path, size in zip(paths, sizes, strict=True)
                ]
                self._rings = [Ring(arena, *size, own_counter=rank) for arena, size in zip(arenas, sizes, strict=True)]
        for ring in self._rings:
            ring.turn_to(update)
        wire = RingWire(
            paths=tuple(paths),
            update=update,
            sources=context.group.size,
            replicas=context.replicas,
            cell_bytes=tuple(self._cell_bytes),
        )
        return wire, RingOutlet(self._rings, route, context.timeout)

    def verify(self, with_digests: bool) -> None:
        """Does nothing: the workers verify."""

    def commit(self, version: int, digest: str | None, proofs: Sequence[str]) -> None:
        """Does nothing: the workers hold the version already."""

    def abort(self) -> None:
        """Closes the rings, because a late rank may still write to them; the next version gets others."""
        self.close()

    def close(self) -> None:
        while self._rings:
            self._rings.pop().close()
