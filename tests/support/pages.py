"""Which pages of a file a read asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mbridge_rl.hf.rectangles import Rectangle

PAGE = 4096


def watched(real: Callable[..., int], pages: set[int]) -> Callable[..., int]:
    def preadv(descriptor: int, buffers: list[memoryview], position: int) -> int:
        got = real(descriptor, buffers, position)
        pages.update(range(position // PAGE, (position + max(got, 1) - 1) // PAGE + 1))
        return got

    return preadv


def pages_of(rectangle: Rectangle) -> set[int]:
    positions = torch.tensor(rectangle.start)
    for size, stride in zip(rectangle.shape, rectangle.strides, strict=True):
        positions = positions[..., None] + torch.arange(size) * stride * rectangle.dtype.itemsize
    first, last = positions // PAGE, (positions + rectangle.dtype.itemsize - 1) // PAGE
    return {*first.flatten().tolist(), *last.flatten().tolist()}
