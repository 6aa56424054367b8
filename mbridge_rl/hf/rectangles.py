"""Rectangles of a tensor in a file: reading and writing exactly the bytes that they are made of.

A rectangle falls into blocks of adjacent bytes. Where memory is laid out as the file is they go straight there; otherwise they
pass through a small staging buffer, which also casts. No page beside the rectangle's own is ever asked for.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy
import torch
from torch import Tensor

from mbridge_rl.core.segments import Shape

STAGING_BYTES = 8 << 20
# Blocks with smaller gaps are read as one: storage is read by pages, so that stepping over less saves nothing.
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Rectangle:
    """`[*shape]` elements of `dtype`, the first at byte `start` of a file, then in steps of `strides` elements."""

    dtype: torch.dtype
    start: int
    shape: Shape
    strides: Shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A rectangle as equal blocks: where each begins in the file, their extent in elements, and where elements lie when the
    blocks stand one after the other in memory (`strides`)."""

    starts: list[int]
    extent: int
    strides: Shape

    def packed_elements(self) -> int:
        return len(self.starts) * self.extent


def read_into(descriptor: int, rectangle: Rectangle, target: Tensor) -> None:
    """Fills `target`, `[*shape]` with any strides, dtype and device, from the file.

    Raises:
        EOFError: the file ends inside of the rectangle; OSError: it cannot be read.
    """
    direct = _direct_blocks(rectangle, target)
    if direct is not None:
        for memory, position in direct:
            _read_exactly(descriptor, memory, position)
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
        OSError: it cannot be written.
    """
    direct = _direct_blocks(rectangle, source)
    if direct is not None:
        for memory, position in direct:
            _write_all(descriptor, memory, position)
        return
    for part, narrowed in _bounded(rectangle, source, 0):
        blocks = _blocks(part, 0)
        staging, memory = _staging(blocks, part.dtype)
        staging.as_strided(part.shape, blocks.strides).copy_(narrowed)
        nbytes = blocks.extent * part.dtype.itemsize
        for index, position in enumerate(blocks.starts):
            _write_all(descriptor, memory[index * nbytes : (index + 1) * nbytes], position)


def _blocks(rectangle: Rectangle, gap_bytes: int) -> _Blocks:
    """Cuts a rectangle where it leaves out `gap_bytes` or more."""
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
    """Bytes into the file at every index of `dims`, the last of them fastest."""
    positions = numpy.array(rectangle.start)
    for dim in dims:
        steps = numpy.arange(rectangle.shape[dim]) * (rectangle.strides[dim] * rectangle.dtype.itemsize)
        positions = positions[..., None] + steps
    return positions.ravel().tolist()


def _bounded(rectangle: Rectangle, tensor: Tensor, gap_bytes: int) -> Iterator[tuple[Rectangle, Tensor]]:
    """Cuts a rectangle, and the tensor beside it, into parts that fit the staging buffer."""
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


def _direct_blocks(rectangle: Rectangle, tensor: Tensor) -> Iterator[tuple[memoryview, int]] | None:
    """Blocks as `(memory of the tensor, position in the file)`; `None` where they are scattered in memory, or not worth it."""
    if not tensor.is_cpu or tensor.dtype != rectangle.dtype or tensor.numel() == 0:
        return None
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
    memory = _memory(tensor)
    nbytes = extent * itemsize
    return ((memory[begin : begin + nbytes], position) for begin, position in zip(in_memory, in_file, strict=True))


def _memory(tensor: Tensor) -> memoryview:
    """All bytes between the first and the last element of a CPU tensor, which must outlive the view."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return memoryview((ctypes.c_char * (elements * tensor.element_size())).from_address(tensor.data_ptr())).cast("B")


def _staging(blocks: _Blocks, dtype: torch.dtype) -> tuple[Tensor, memoryview]:
    staging = torch.empty(blocks.packed_elements(), dtype=dtype)
    return staging, _memory(staging)


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
