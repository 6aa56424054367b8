"""The schedule of an export: a plan whose targets are HF tensors, cut into buckets of bounded size.

Tensors lie in a bucket as they do in a checkpoint, one after another; a tensor that is larger than a bucket travels in chunks,
so that staging memory depends on neither the model nor its largest tensor. A schedule is computed once per export and touches
no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from mbridge_rl.core.buckets import aligned
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.plan import Copy, View
from mbridge_rl.core.segments import Shape


@dataclass(frozen=True, slots=True)
class StreamPiece:
    """A rectangle `[*shape]` that one rank contributes.

    Attributes:
        source_rank: the rank that contributes it.
        shape: the shape of the rectangle.
        source: where it lies in the rank's own tensor.
        target: where it lies in the HF tensor.
        start: its first byte in the payload that `source_rank` packs for this bucket.
    """

    source_rank: int
    shape: Shape
    source: View
    target: View
    start: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class StreamSpan:
    """Elements `[first, last)` of an HF tensor, which lie `offset` bytes into their bucket."""

    tensor: HFTensor
    first: int
    last: int
    offset: int
    pieces: tuple[StreamPiece, ...]

    @property
    def begins_tensor(self) -> bool:
        return self.first == 0

    @property
    def ends_tensor(self) -> bool:
        return self.last == prod(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return (self.last - self.first) * self.tensor.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StreamBucket:
    """Spans in checkpoint order.

    Attributes:
        spans: the spans.
        nbytes: bytes of the bucket in HF layout.
        packed_nbytes: bytes of the packed pieces of each contributing rank.
    """

    spans: tuple[StreamSpan, ...]
    nbytes: int
    packed_nbytes: Mapping[int, int]


@dataclass
class _Filling:
    """A bucket under construction."""

    spans: list[StreamSpan] = field(default_factory=list)
    end: int = 0
    packed: dict[int, int] = field(default_factory=dict)

    def add(self, tensor: HFTensor, first: int, last: int, copies: Sequence[Copy]) -> None:
        pieces = []
        for copy in copies:
            for shape, source, target in clipped(copy.shape, copy.source, copy.target, first, last):
                start = self.packed.get(copy.source_rank, 0)
                pieces.append(StreamPiece(copy.source_rank, shape, source, target, start))
                self.packed[copy.source_rank] = aligned(start + prod(shape) * tensor.dtype.itemsize)
        self.spans.append(StreamSpan(tensor, first, last, self.end, tuple(pieces)))
        self.end = aligned(self.end + self.spans[-1].nbytes)

    def done(self) -> StreamBucket:
        return StreamBucket(tuple(self.spans), self.end, dict(sorted(self.packed.items())))


def schedule(tensors: Sequence[HFTensor], copies: Mapping[str, Sequence[Copy]], bucket_bytes: int) -> list[StreamBucket]:
    """Distributes `tensors`, in order, over buckets.

    Args:
        tensors: the HF tensors of the export.
        copies: `{hf_name: copies}` of a plan whose targets are HF tensors.
        bucket_bytes: bytes of a bucket, without alignment (at most 64 bytes per rectangle).
    """
    buckets: list[StreamBucket] = []
    filling = _Filling()
    for tensor in tensors:
        for first, last in _cuts(tensor, bucket_bytes):
            nbytes = (last - first) * tensor.dtype.itemsize
            if filling.spans and filling.end + nbytes > bucket_bytes:
                buckets.append(filling.done())
                filling = _Filling()
            filling.add(tensor, first, last, copies.get(tensor.hf_name, ()))
    return [*buckets, filling.done()] if filling.spans else buckets


def _cuts(tensor: HFTensor, bucket_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of elements that fit into a bucket: the full tensor, or as many complete rows as fit, or parts of a row."""
    numel = prod(tensor.shape)
    limit = max(1, bucket_bytes // tensor.dtype.itemsize)
    unit, dim = numel, 0
    while unit > limit and dim < len(tensor.shape):
        unit //= tensor.shape[dim]
        dim += 1
    step = limit // max(1, unit) * unit if unit else 1
    for first in range(0, max(numel, 1), step):
        yield first, min(first + step, numel)


def clipped(shape: Shape, source: View, target: View, first: int, last: int) -> Iterator[tuple[Shape, View, View]]:
    """The rectangles of a copy that lie in elements `[first, last)` of the target tensor. `target` must not overlap itself."""
    extent = sum((size - 1) * stride for size, stride in zip(shape, target.strides, strict=True))
    low, high = target.offset, target.offset + extent
    if low >= last or high < first:
        return
    if first <= low and high < last:
        yield shape, source, target
        return
    dim = max((dim for dim, size in enumerate(shape) if size > 1), key=lambda dim: target.strides[dim])
    step, size = target.strides[dim], shape[dim]
    inner = extent - (size - 1) * step
    inside_from = _between(-(-(first - low) // step), size)
    inside_to = max(inside_from, _between((last - 1 - inner - low) // step + 1, size))
    touched_from = _between(-(-(first - inner - low) // step), size)
    touched_to = _between((last - 1 - low) // step + 1, size)
    for index in range(touched_from, min(inside_from, touched_to)):
        yield from clipped(*_narrowed(shape, source, target, dim, index, 1), first, last)
    if inside_to > inside_from:
        yield _narrowed(shape, source, target, dim, inside_from, inside_to - inside_from)
    for index in range(max(inside_to, touched_from), touched_to):
        yield from clipped(*_narrowed(shape, source, target, dim, index, 1), first, last)


def _between(index: int, size: int) -> int:
    return min(max(index, 0), size)


def _narrowed(shape: Shape, source: View, target: View, dim: int, start: int, count: int) -> tuple[Shape, View, View]:
    return (
        (*shape[:dim], count, *shape[dim + 1 :]),
        View(source.name, source.offset + start * source.strides[dim], source.strides),
        View(target.name, target.offset + start * target.strides[dim], target.strides),
    )
