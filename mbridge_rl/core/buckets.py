"""Alignment of packed tensors: where consecutive byte ranges begin."""

from __future__ import annotations

from collections.abc import Iterable

ALIGNMENT = 64  # bytes: a multiple of every dtype's size, and a cache line


def offsets(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Aligned offsets of consecutive byte ranges of these sizes, and the aligned end of the last one."""
    starts, end = [], 0
    for nbytes in sizes:
        starts.append(end)
        end = aligned(end + nbytes)
    return starts, end


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
