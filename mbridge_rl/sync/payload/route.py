"""Routes: what each engine worker receives in one sync, as bytes.

A worker's *image* holds all weights of the worker, packed in checkpoint order and cut into aligned buckets. Inside a bucket,
the bytes that one trainer rank contributes are one contiguous *part*. The last bucket holds the trainer ranks' digests. Every
transport carries these buckets, and the weight store keeps the full image. A route is computed once and touches no tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from mbridge_rl.core.buckets import aligned
from mbridge_rl.core.plan import Copy, Plan, View
from mbridge_rl.core.segments import Shape

_LINE = 512  # elements: a row of a rectangle is cut at multiples of this, so that no digest word is cut
_DIGEST_BYTES = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle `[*shape]` on its way from a trainer rank to a worker.

    Attributes:
        hf_name: the HF tensor that the rectangle is a part of.
        dtype: the dtype of the target parameter, which is the dtype on the wire as well.
        source: where the trainer rank reads the rectangle.
        target: where the worker writes it.
        hf: where the rectangle lies in the HF tensor.
        columns: size of the last dimension of the HF tensor.
        offset: the first byte of the rectangle in the image.
        counted: whether this piece is the one that counts among all pieces with the same elements of the HF tensor; the counted
            pieces together hold every element once.
    """

    hf_name: str
    shape: Shape
    dtype: torch.dtype
    source: View
    target: View
    hf: View
    columns: int
    offset: int
    counted: bool

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes `[start, start + nbytes)` of the image, packed by one trainer rank. A part without pieces holds its digests."""

    source_rank: int
    start: int
    nbytes: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Bytes `[start, start + nbytes)` of the image."""

    start: int
    nbytes: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class WorkerRoute:
    """The image of one worker.

    Attributes:
        rank: the rank of the worker in its engine.
        hf_names: the HF tensors that have pieces in the image; a digest part holds 8 bytes for each, in this order.
        buckets: the buckets of the image; the last one holds the digests.
        nbytes: bytes of the image.
    """

    rank: int
    hf_names: tuple[str, ...]
    buckets: tuple[Bucket, ...]
    nbytes: int

    @property
    def pieces(self) -> Iterator[Piece]:
        return (piece for bucket in self.buckets for part in bucket.parts for piece in part.pieces)

    @property
    def digest_parts(self) -> tuple[Part, ...]:
        return self.buckets[-1].parts

    @property
    def bucket_bytes(self) -> int:
        """Size of the largest bucket."""
        return max(bucket.nbytes for bucket in self.buckets)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the weights alone, without alignment and digests."""
        return sum(piece.nbytes for piece in self.pieces)

    def to_json(self) -> dict[str, Any]:
        """The route as plain JSON types, for the worker and for later readers of its image. It leaves out where the trainer
        reads each piece."""
        index = {hf_name: position for position, hf_name in enumerate(self.hf_names)}
        return {
            "rank": self.rank,
            "hf_names": self.hf_names,
            "nbytes": self.nbytes,
            "buckets": [
                [bucket.start, bucket.nbytes, [
                    [part.source_rank, part.start, part.nbytes, [
                        [index[piece.hf_name], piece.shape, str(piece.dtype).removeprefix("torch."), piece.target.name,
                         piece.target.offset, piece.target.strides, piece.hf.offset, piece.hf.strides, piece.columns,
                         piece.offset, piece.counted]
                        for piece in part.pieces
                    ]]
                    for part in bucket.parts
                ]]
                for bucket in self.buckets
            ],
        }  # fmt: skip

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> WorkerRoute:
        """The inverse of `to_json`; the source views of the pieces are empty."""
        names = tuple(fields["hf_names"])
        buckets = tuple(
            Bucket(
                start,
                nbytes,
                tuple(
                    Part(rank, at, size, tuple(_piece_from_json(names, piece) for piece in pieces))
                    for rank, at, size, pieces in parts
                ),
            )
            for start, nbytes, parts in fields["buckets"]
        )
        return cls(fields["rank"], names, buckets, fields["nbytes"])


@dataclass(frozen=True)
class Route:
    """The images of all workers of an engine."""

    workers: tuple[WorkerRoute, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the routes that the workers get; both ends compare it before the first byte is sent."""
        return fingerprint_of(self.workers)

    def parts_of(self, source_rank: int) -> Iterator[tuple[WorkerRoute, int, Part]]:
        """All parts that one trainer rank packs, as `(worker, bucket index, part)`, in the order in which workers load them."""
        for index in range(max(len(worker.buckets) for worker in self.workers)):
            for worker in self.workers:
                if index < len(worker.buckets):
                    for part in worker.buckets[index].parts:
                        if part.source_rank == source_rank:
                            yield worker, index, part


def fingerprint_of(workers: Sequence[WorkerRoute]) -> str:
    """Hex digest of the routes of all workers."""
    return hashlib.blake2b(json.dumps([worker.to_json() for worker in workers]).encode(), digest_size=8).hexdigest()


def plan_route(plan: Plan, workers: Sequence[int], dtypes: Mapping[str, torch.dtype], bucket_bytes: int) -> Route:
    """Cuts what `plan` moves to each of `workers` into buckets.

    Args:
        plan: the copies from trainer ranks to workers.
        workers: the ranks of the workers.
        dtypes: the dtype of every local tensor of the target side.
        bucket_bytes: bytes of a bucket, without alignment.
    """
    by_worker: dict[int, list[Copy]] = {worker: [] for worker in workers}
    counted = _counted(plan)
    for copy in plan.copies:
        by_worker[copy.target_rank].append(copy)
    return Route(
        tuple(
            _worker_route(worker, copies, counted, dtypes, plan.hf_shapes, bucket_bytes) for worker, copies in by_worker.items()
        )
    )


def _counted(plan: Plan) -> set[int]:
    """The `id`s of the copies that together hold every element of their HF tensor once: the first of equal rectangles."""
    seen: set[tuple[str, Shape, int, Shape]] = set()
    first = set()
    for copy in plan.copies:
        rectangle = (copy.hf_name, copy.shape, copy.hf.offset, copy.hf.strides)
        if rectangle not in seen:
            seen.add(rectangle)
            first.add(id(copy))
    return first


def _worker_route(
    worker: int,
    copies: Sequence[Copy],
    counted: set[int],
    dtypes: Mapping[str, torch.dtype],
    hf_shapes: Mapping[str, Shape],
    bucket_bytes: int,
) -> WorkerRoute:
    filling: list[tuple[int, Piece]] = []
    buckets: list[Bucket] = []
    filled = end = 0
    for copy in copies:
        dtype = dtypes[copy.target.name]
        columns = hf_shapes[copy.hf_name][-1] if hf_shapes[copy.hf_name] else 1
        for chunk in chunks_of(copy, max(_LINE, bucket_bytes // dtype.itemsize)):
            piece = Piece(copy.hf_name, chunk.shape, dtype, chunk.source, chunk.target, chunk.hf, columns, 0,
                          id(copy) in counted)  # fmt: skip
            if filling and filled + piece.nbytes > bucket_bytes:
                buckets.append(_bucket(filling, end))
                end += buckets[-1].nbytes
                filling, filled = [], 0
            filling.append((copy.source_rank, piece))
            filled = aligned(filled + piece.nbytes)
    if filling:
        buckets.append(_bucket(filling, end))
        end += buckets[-1].nbytes
    names = tuple(dict.fromkeys(copy.hf_name for copy in copies))
    buckets.append(_digests(sorted({copy.source_rank for copy in copies}), len(names), end))
    return WorkerRoute(worker, names, tuple(buckets), end + buckets[-1].nbytes)


def _bucket(filling: Sequence[tuple[int, Piece]], start: int) -> Bucket:
    parts, end = [], start
    for rank in sorted({rank for rank, _ in filling}):
        part_start, pieces = end, []
        for source_rank, piece in filling:
            if source_rank == rank:
                pieces.append(replace(piece, offset=end))
                end = aligned(end + piece.nbytes)
        parts.append(Part(rank, part_start, end - part_start, tuple(pieces)))
    return Bucket(start, end - start, tuple(parts))


def _digests(source_ranks: Sequence[int], names: int, start: int) -> Bucket:
    size = aligned(names * _DIGEST_BYTES)
    parts = tuple(Part(rank, start + index * size, size, ()) for index, rank in enumerate(source_ranks))
    return Bucket(start, len(parts) * size, parts)


def chunks_of(copy: Copy, elements: int) -> Iterator[Copy]:
    """The copy in rectangles of at most `elements` elements (at least 512), cut along the slowest dimensions first."""
    if copy.numel <= elements:
        yield copy
        return
    dim = next(dim for dim, size in enumerate(copy.shape) if size > 1)
    inner = copy.numel // copy.shape[dim]
    step = max(1, elements // inner)
    if dim == len(copy.shape) - 1:
        step = step // _LINE * _LINE
    for first in range(0, copy.shape[dim], step):
        count = min(step, copy.shape[dim] - first)
        cut = replace(
            copy,
            shape=(*copy.shape[:dim], count, *copy.shape[dim + 1 :]),
            source=_moved(copy.source, dim, first),
            target=_moved(copy.target, dim, first),
            hf=_moved(copy.hf, dim, first),
        )
        yield from chunks_of(cut, elements)


def _moved(view: View, dim: int, steps: int) -> View:
    return replace(view, offset=view.offset + steps * view.strides[dim])


def _piece_from_json(hf_names: Sequence[str], fields: Sequence[Any]) -> Piece:
    (
        name_index,
        shape,
        dtype,
        parameter_name,
        target_offset,
        target_strides,
        hf_offset,
        hf_strides,
        columns,
        image_offset,
        counted,
    ) = fields
    hf_name = hf_names[name_index]
    source = View("", 0, tuple(hf_strides))  # unknown here
    target = View(parameter_name, target_offset, tuple(target_strides))
    hf = View(hf_name, hf_offset, tuple(hf_strides))
    return Piece(hf_name, tuple(shape), getattr(torch, dtype), source, target, hf, columns, image_offset, counted)
