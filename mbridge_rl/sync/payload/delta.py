"""Deltas: a sync that carries what changed since the last committed version, bit for bit, instead of everything.

A delta is the same route with smaller parts: every part of every bucket is replaced by the compressed differences of its
pieces (`sync.payload.difference`, zstd), or stays as it is if that is not smaller. All transports carry it. The worker's end
restores the full parts, from the changes and the weights that it serves, before anything else sees them, so staging, loading
and proofs are those of every sync.

A trainer rank keeps a packed copy of what it sent last; a worker keeps nothing but its weights. Both name the version that a
delta starts from by its *proof*, a hash of the digests of all weights of the worker. A worker refuses a delta that starts from
another proof than its own. The digests of the new version, which travel with every sync, prove the result.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mbridge_rl.core.buckets import aligned
from mbridge_rl.core.errors import missing_extra
from mbridge_rl.sync.payload import difference as delta
from mbridge_rl.sync.payload import packing
from mbridge_rl.sync.payload.difference import Difference, Kind
from mbridge_rl.sync.payload.engine_side import UNSPLIT_TENSOR
from mbridge_rl.sync.payload.messages import DeltaBase
from mbridge_rl.sync.payload.route import Bucket, Part, Route, WorkerRoute

_log = logging.getLogger(__name__)

_LEVEL = 3
_HEAD = struct.Struct("<QQ")  # size of the compressed frames in bytes, their CRC-32
_FRAME = struct.Struct("<BQQ")  # kind, count, size of the planes in bytes


def shrunk(route: WorkerRoute, sizes: Sequence[int]) -> WorkerRoute:
    """The route of a delta: its parts have `sizes` bytes, one size per part in order, and no pieces of their own."""
    remaining, end, buckets = iter(sizes), 0, []
    for bucket in route.buckets:
        start, parts = end, []
        for part in bucket.parts:
            parts.append(replace(part, start=end, nbytes=next(remaining), pieces=()))
            end = aligned(end + parts[-1].nbytes)
        buckets.append(Bucket(start, end - start, tuple(parts)))
    return WorkerRoute(route.rank, route.hf_names, tuple(buckets), end)


def carried_bytes(worker: WorkerRoute) -> int:
    """Bytes of all buckets except the bucket of digests."""
    return sum(bucket.nbytes for bucket in worker.buckets[:-1])


@dataclass(frozen=True)
class Delta:
    """One version as changes.

    Attributes:
        base: the version that the changes start from.
        route: the route with shrunk parts.
        message: what the workers need: by worker, the proof of `base` and the sizes of the parts.
    """

    base: int
    route: Route
    message: DeltaBase

    @classmethod
    def of(cls, route: Route, base: int, proofs: Sequence[str], sizes: Sequence[int]) -> Delta:
        """Makes a delta.

        Args:
            route: the route of the sync.
            base: the version that the changes start from.
            proofs: the proofs of all workers at `base`.
            sizes: the bytes of all parts of all workers, in order.
        """
        remaining = iter(sizes)
        worker_sizes = [[next(remaining) for bucket in worker.buckets for _ in bucket.parts] for worker in route.workers]
        workers = tuple(shrunk(worker, own_sizes) for worker, own_sizes in zip(route.workers, worker_sizes, strict=True))
        return cls(base, Route(workers), DeltaBase(tuple(proofs), tuple(map(tuple, worker_sizes))))

    @property
    def nbytes(self) -> int:
        """Bytes that all workers of one engine receive, without digests."""
        return sum(map(carried_bytes, self.route.workers))


def compressed_changes(part: Part, old: Tensor, new: Tensor) -> Tensor | None:
    """The compressed differences of the pieces of a packed part (uint8); `None` if they are not smaller than the part."""
    if any(piece.target.name.startswith(UNSPLIT_TENSOR) for piece in part.pieces):
        return None  # only the worker's own loader knows where it keeps the old values
    frames = []
    for piece in part.pieces:
        change = delta.difference(*(packing.rectangle(piece, data, part.start) for data in (old, new)))
        frames += [_FRAME.pack(change.kind, change.count, len(change.planes)), change.planes]
    data = _zstandard().ZstdCompressor(level=_LEVEL).compress(b"".join(frames))
    size = aligned(_HEAD.size + len(data))
    if size >= part.nbytes:
        return None
    return torch.frombuffer(bytearray((_HEAD.pack(len(data), zlib.crc32(data)) + data).ljust(size, b"\0")), dtype=torch.uint8)


def apply_changes(part: Part, data: Tensor, packed: Tensor) -> None:
    """Turns the packed part (uint8 `[part.nbytes]`) of one version into that of the other, in place.

    Args:
        data: the result of `compressed_changes`.
        packed: the packed part.

    Raises:
        ValueError, struct.error: `data` does not belong to this part, or was damaged.
    """
    for piece, change in zip(part.pieces, _differences(data.numpy().tobytes(), len(part.pieces)), strict=True):
        delta.apply_to(packing.rectangle(piece, packed, part.start), change)


def _differences(data: bytes, count: int) -> Iterator[Difference]:
    size, checksum = _HEAD.unpack_from(data)
    compressed = data[_HEAD.size : _HEAD.size + size]
    if zlib.crc32(compressed) != checksum:  # checked first: a damaged frame may make zstd ask for any amount of memory
        raise ValueError("their checksum is wrong")
    frames, start = _zstandard().ZstdDecompressor().decompress(compressed), 0
    for _ in range(count):
        kind, elements, nbytes = _FRAME.unpack_from(frames, start)
        start += _FRAME.size
        yield Difference(Kind(kind), elements, frames[start : start + nbytes])
        start += nbytes


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise missing_extra("deltas are compressed with zstd", "delta") from error
    return zstandard
