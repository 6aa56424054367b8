"""Reads and writes rectangles of a tensor in a file, and exactly their bytes.

A rectangle consists of blocks of adjacent bytes. If the memory has the same layout as the file, blocks are read directly into
it; otherwise they pass through a small staging buffer, which also casts. Only the rectangle's own pages are read.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy
import torch
from torch import Tensor

from mbridge_rl.core.segments import Shape

STAGING_BYTES = 8 << 20
# Blocks with smaller gaps are read as one: storage is read in pages, so that skipping less than a page saves nothing.
_PAGE = 4096
# Limits of one call: the kernel takes 1,024 pieces of memory, and fewer than 2 GiB.
_MOST_NEIGHBOURS = 1024
_MOST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Elements `[*shape]` of `dtype` in a file: the first at byte `start`, the others at steps of `strides` elements."""

    dtype: torch.dtype
    start: int
    shape: Shape
    strides: Shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A rectangle as blocks of equal size: the position of each in the file, their extent in elements, and the strides of the
    elements if the blocks follow each other in memory."""

    starts: list[int]
    extent: int
    strides: Shape

    def packed_elements(self) -> int:
        return len(self.starts) * self.extent


def read_into(descriptor: int, rectangle: Rectangle, target: Tensor) -> None:
    """Fills `target`, `[*shape]` with any strides, dtype and device, from the file.

    Raises:
        EOFError: the file ends inside of the rectangle.
        OSError: the file cannot be read.
    """
    direct = _direct_blocks(rectangle, target)
    if direct is None:
        _read_staged(descriptor, rectangle, target)
    else:
        for memory, position in direct:
            _read_exactly(descriptor, memory, position)


def read_many(descriptor: int, requests: Iterable[tuple[str, Rectangle, Tensor]]) -> None:
    """Fills every target from its rectangle as `read_into` does, in the order of the file, with one call for blocks that are
    adjacent in the file. Requests are `(name for the error, rectangle, target)`.

    Raises:
        EOFError, OSError: as in `read_into`; the message names the request. Targets that come later in the file are not filled.
    """
    neighbours: list[tuple[memoryview, int, str]] = []
    end, nbytes = -1, 0
    for name, rectangle, target in sorted(requests, key=lambda request: request[1].start):
        direct = _direct_blocks(rectangle, target)
        if direct is None:
            with _named(name):
                _read_staged(descriptor, rectangle, target)
            continue
        for memory, position in direct:
            if position != end or len(neighbours) == _MOST_NEIGHBOURS or nbytes >= _MOST_BYTES:
                _read_neighbours(descriptor, neighbours)
                neighbours, nbytes = [], 0
            neighbours.append((memory, position, name))
            end, nbytes = position + len(memory), nbytes + len(memory)
    _read_neighbours(descriptor, neighbours)


def _read_neighbours(descriptor: int, blocks: Sequence[tuple[memoryview, int, str]]) -> None:
    """Reads blocks that follow each other in the file with one call or, if that reads too few bytes, one by one."""
    if len(blocks) > 1:
        with contextlib.suppress(OSError):
            count = os.preadv(descriptor, [memory for memory, _, _ in blocks], blocks[0][1])
            if count == sum(len(memory) for memory, _, _ in blocks):
                return
    for memory, position, name in blocks:
        with _named(name):
            _read_exactly(descriptor, memory, position)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise type(error)(f"{name}: {error}") from error


def _read_staged(descriptor: int, rectangle: Rectangle, target: Tensor) -> None:
    if target.numel() == 0:
        return
    for part, narrowed in _bounded(rectangle, target, _PAGE):
        blocks = _blocks(part, _PAGE)
        staging, memory = _staging(blocks, part.dtype)
        nbytes = blocks.extent * part.dtype.itemsize
        for index, position in enumerate(blocks.starts):
            _read_exactly(descriptor, memory[index * nbytes : (index + 1) * nbytes], position)
        narrowed.copy_(staging.as_strided(part.shape, blocks.strides))


def write_from(descriptor: int, rectangle: Rectangle, source: Tensor) -> None:
    """Writes `source`, `[*shape]` with any strides, dtype and device, into the file.

    Raises:
        OSError: the file cannot be written.
    """
    direct = _direct_blocks(rectangle, source)
    if direct is not None:
        for memory, position in direct:
            _write_all(descriptor, memory, position)
        return
    if source.numel() == 0:
        return
    for part, narrowed in _bounded(rectangle, source, 0):
        blocks = _blocks(part, 0)
        staging, memory = _staging(blocks, part.dtype)
        staging.as_strided(part.shape, blocks.strides).copy_(narrowed)
        nbytes = blocks.extent * part.dtype.itemsize
        for index, position in enumerate(blocks.starts):
            _write_all(descriptor, memory[index * nbytes : (index + 1) * nbytes], position)


def _blocks(rectangle: Rectangle, gap_bytes: int) -> _Blocks:
    """Divides a rectangle into blocks at gaps of `gap_bytes` or more."""
    itemsize = rectangle.dtype.itemsize
    order = sorted((dim for dim, size in enumerate(rectangle.shape) if size > 1), key=lambda dim: rectangle.strides[dim])
    extent, inner = 1, 0
    for dim in order:
        gap = (rectangle.strides[dim] - extent) * itemsize
        if gap > 0 and gap >= gap_bytes:
            break
        extent += (rectangle.shape[dim] - 1) * rectangle.strides[dim]
        inner += 1
    outer = order[inner:][::-1]
    strides, step = list(rectangle.strides), extent
    for dim in reversed(outer):
        strides[dim] = step
        step *= rectangle.shape[dim]
    return _Blocks(_positions(rectangle, outer), extent, tuple(strides))


def _positions(rectangle: Rectangle, dims: list[int]) -> list[int]:
    """The byte positions in the file of every index of `dims`, the last of them fastest."""
    positions = numpy.array(rectangle.start)
    for dim in dims:
        steps = numpy.arange(rectangle.shape[dim]) * (rectangle.strides[dim] * rectangle.dtype.itemsize)
        positions = positions[..., None] + steps
    return positions.ravel().tolist()


def _bounded(rectangle: Rectangle, tensor: Tensor, gap_bytes: int) -> Iterator[tuple[Rectangle, Tensor]]:
    """Divides a rectangle, and its tensor, into parts that fit the staging buffer."""
    packed = _blocks(rectangle, gap_bytes).packed_elements() * rectangle.dtype.itemsize
    if packed <= STAGING_BYTES:
        yield rectangle, tensor
        return
    dim = max((dim for dim, size in enumerate(rectangle.shape) if size > 1), key=lambda dim: rectangle.strides[dim])
    size = rectangle.shape[dim]
    step = max(1, size * STAGING_BYTES // packed)
    for first in range(0, size, step):
        count = min(step, size - first)
        start = rectangle.start + first * rectangle.strides[dim] * rectangle.dtype.itemsize
        shape = (*rectangle.shape[:dim], count, *rectangle.shape[dim + 1 :])
        yield from _bounded(replace(rectangle, start=start, shape=shape), tensor.narrow(dim, first, count), gap_bytes)


def _direct_blocks(rectangle: Rectangle, tensor: Tensor) -> Iterable[tuple[memoryview, int]] | None:
    """The blocks as `(memory of the tensor, position in the file)`; `None` if they are not contiguous in memory, or too
    small."""
    if not tensor.is_cpu or tensor.dtype != rectangle.dtype or tensor.numel() == 0:
        return None
    if _is_one_block(rectangle) and tensor.is_contiguous():
        return [(_memory(tensor, tensor.numel()), rectangle.start)]
    order = sorted((dim for dim, size in enumerate(rectangle.shape) if size > 1), key=lambda dim: rectangle.strides[dim])
    extent, inner = 1, 0
    while inner < len(order) and rectangle.strides[order[inner]] == tensor.stride(order[inner]) == extent:
        extent *= rectangle.shape[order[inner]]
        inner += 1
    outer, itemsize = order[inner:][::-1], rectangle.dtype.itemsize
    if outer and extent * itemsize < _PAGE:
        return None
    in_file = _positions(rectangle, outer)
    in_memory = _positions(Rectangle(rectangle.dtype, 0, rectangle.shape, tensor.stride()), outer)
    memory = _memory(tensor, 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)))
    nbytes = extent * itemsize
    return ((memory[begin : begin + nbytes], position) for begin, position in zip(in_memory, in_file, strict=True))


def _is_one_block(rectangle: Rectangle) -> bool:
    step = 1
    for size, stride in zip(reversed(rectangle.shape), reversed(rectangle.strides), strict=True):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True


def _memory(tensor: Tensor, elements: int) -> memoryview:
    """The bytes of the first `elements` elements of a CPU tensor, which must outlive the view."""
    return memoryview((ctypes.c_char * (elements * tensor.element_size())).from_address(tensor.data_ptr())).cast("B")


def _staging(blocks: _Blocks, dtype: torch.dtype) -> tuple[Tensor, memoryview]:
    staging = torch.empty(blocks.packed_elements(), dtype=dtype)
    return staging, _memory(staging, len(staging))


def _read_exactly(descriptor: int, memory: memoryview, position: int) -> None:
    while memory:
        count = os.preadv(descriptor, [memory], position)
        if count == 0:
            raise EOFError(f"the file ends {len(memory)} bytes too early")
        memory, position = memory[count:], position + count


def _write_all(descriptor: int, memory: memoryview, position: int) -> None:
    while memory:
        count = os.pwrite(descriptor, memory, position)
        memory, position = memory[count:], position + count
