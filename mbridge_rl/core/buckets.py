"""Buckets: HF tensors packed, in checkpoint order, into aligned byte ranges of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mbridge_rl.core.model import HFTensor

ALIGNMENT = 64  # bytes: every dtype, and a cache line


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies in its bucket, in bytes."""

    tensor: HFTensor
    offset: int


@dataclass(frozen=True, slots=True)
class Bucket:
    slots: tuple[Slot, ...]
    nbytes: int


def pack(tensors: Sequence[HFTensor], bucket_bytes: int) -> list[Bucket]:
    """Fills buckets of at most `bucket_bytes`; a tensor that is larger gets a bucket of its own."""
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    end = 0
    for tensor in tensors:
        if slots and end + tensor.nbytes > bucket_bytes:
            buckets.append(Bucket(tuple(slots), end))
            slots, end = [], 0
        slots.append(Slot(tensor, end))
        end = aligned(end + tensor.nbytes)
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
