"""Deltas: a sync that carries what changed since the last committed version, bit for bit, instead of everything.

A delta is the same route with smaller parts: every part of every bucket is replaced by the compressed differences of its
pieces (`sync.payload.difference`, zstd), or stays as it is where that is not smaller. All transports carry it, and the worker's
end makes whole parts of it again, from the weights that it serves, before anything else sees them: staging, loading and proofs
are those of every sync.

A trainer rank keeps a packed copy of what it sent last; a worker keeps nothing but its weights. Both name the version that a
delta starts from by its *proof*, a hash of the digests of all that the worker keeps. A worker whose own is another refuses, and
the digests of the new version, which travel with every sync, prove what came out of it.
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
from mbridge_rl.sync.payload import difference as delta
from mbridge_rl.sync.payload import packing
from mbridge_rl.sync.payload.difference import Difference, Kind
from mbridge_rl.sync.payload.engine_side import WHOLE_TENSOR
from mbridge_rl.sync.payload.route import Bucket, Part, Route, WorkerRoute

_log = logging.getLogger(__name__)

_LEVEL = 3
_HEAD = struct.Struct("<QQ")  # bytes of the compressed frames, and their CRC-32
_FRAME = struct.Struct("<BQQ")  # kind, count, bytes of the planes


def shrunk(route: WorkerRoute, sizes: Sequence[int]) -> WorkerRoute:
    """The route with parts of `sizes` bytes, one for every part in order; the pieces are inside, compressed."""
    remaining, end, buckets = iter(sizes), 0, []
    for bucket in route.buckets:
        start, parts = end, []
        for part in bucket.parts:
            parts.append(replace(part, start=end, nbytes=next(remaining), pieces=()))
            end = aligned(end + parts[-1].nbytes)
        buckets.append(Bucket(start, end - start, tuple(parts)))
    return WorkerRoute(route.rank, route.hf_names, tuple(buckets), end)


def carried_bytes(worker: WorkerRoute) -> int:
    """Of all buckets but the digests'."""
    return sum(bucket.nbytes for bucket in worker.buckets[:-1])


@dataclass(frozen=True)
class Delta:
    """One version as changes.

    Attributes:
        base: the version that they start from.
        route: with shrunk parts.
        told: to the workers: every one's proof of `base`, and the sizes of its parts.
    """

    base: int
    route: Route
    told: dict[str, Any]

    @classmethod
    def of(cls, route: Route, base: int, proofs: Sequence[str], sizes: Sequence[int]) -> Delta:
        """From the sizes of all parts of all workers, in order."""
        remaining = iter(sizes)
        of_workers = [[next(remaining) for bucket in worker.buckets for _ in bucket.parts] for worker in route.workers]
        workers = tuple(shrunk(worker, own) for worker, own in zip(route.workers, of_workers, strict=True))
        return cls(base, Route(workers), {"base": list(proofs), "sizes": of_workers})

    @property
    def nbytes(self) -> int:
        """That all workers of one engine receive, without digests."""
        return sum(map(carried_bytes, self.route.workers))


def compressed_changes(part: Part, old: Tensor, new: Tensor) -> Tensor | None:
    """The differences of the pieces of a packed part; `None` where the part itself is not larger."""
    if any(piece.target.name.startswith(WHOLE_TENSOR) for piece in part.pieces):
        return None  # where the worker keeps it only its own loader knows
    frames = []
    for piece in part.pieces:
        found = delta.difference(*(packing.rectangle(piece, data, part.start) for data in (old, new)))
        frames += [_FRAME.pack(found.kind, found.count, len(found.planes)), found.planes]
    data = _zstandard().ZstdCompressor(level=_LEVEL).compress(b"".join(frames))
    size = aligned(_HEAD.size + len(data))
    if size >= part.nbytes:
        return None
    return torch.frombuffer(bytearray((_HEAD.pack(len(data), zlib.crc32(data)) + data).ljust(size, b"\0")), dtype=torch.uint8)


def apply_changes(part: Part, data: Tensor, whole: Tensor) -> None:
    """Turns a packed part from one version into the other. Raises ValueError, struct.error where `data` is none of its."""
    for piece, change in zip(part.pieces, _differences(data.numpy().tobytes(), len(part.pieces)), strict=True):
        delta.apply_to(packing.rectangle(piece, whole, part.start), change)


def _differences(data: bytes, count: int) -> Iterator[Difference]:
    size, checksum = _HEAD.unpack_from(data)
    compressed = data[_HEAD.size : _HEAD.size + size]
    if zlib.crc32(compressed) != checksum:  # before a damaged frame makes zstd ask for any amount of memory
        raise ValueError("their checksum is another")
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
        raise ImportError("deltas are compressed with zstd: pip install 'mbridge-rl[delta]'") from error
    return zstandard
