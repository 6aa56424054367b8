"""Buckets: HF tensors packed, in checkpoint order, into aligned byte ranges of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from mbridge_rl.core.segments import Shape

ALIGNMENT = 64  # bytes: every dtype, and a cache line


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies in its bucket, in bytes."""

    hf_name: str
    shape: Shape
    offset: int
    nbytes: int

    def of(self, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor `[*shape]` inside of `buffer`, a uint8 tensor that begins where the bucket does."""
        return buffer[self.offset : self.offset + self.nbytes].view(dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    slots: tuple[Slot, ...]
    nbytes: int


def pack(hf_shapes: Mapping[str, Shape], dtype: torch.dtype, bucket_bytes: int) -> list[Bucket]:
    """Fills buckets of at most `bucket_bytes`; a tensor that is larger gets a bucket of its own."""
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    end = 0
    for hf_name, shape in hf_shapes.items():
        nbytes = prod(shape) * dtype.itemsize
        if slots and end + nbytes > bucket_bytes:
            buckets.append(Bucket(tuple(slots), end))
            slots, end = [], 0
        slots.append(Slot(hf_name, shape, end, nbytes))
        end = aligned(end + nbytes)
    return [*buckets, Bucket(tuple(slots), end)] if slots else buckets


def offsets(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Aligned offsets of consecutive byte ranges, and where the last one ends."""
    starts, end = [], 0
    for nbytes in sizes:
        starts.append(end)
        end = aligned(end + nbytes)
    return starts, end


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
