"""Where the elements of a Hugging Face tensor land among one engine worker's parameters, as data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mbridge_rl.core.digest import contiguous_strides


@dataclass(frozen=True, slots=True)
class ShapedView:
    """A strided view. `offset` and `strides` count elements, from the tensor's first element."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class Landing:
    """One copy that the engine's loader makes: `source` of the HF tensor goes to `target` of the parameter."""

    hf_name: str
    parameter_name: str
    source: ShapedView  # a view of the row-major HF tensor
    target: ShapedView  # a view of the parameter as it lies in memory; it has the shape of `source`


def times_covered(views: Iterable[ShapedView], shape: Sequence[int], strides: Sequence[int] | None = None) -> Coverage:
    """How often `views` cover each element of a tensor of `shape` whose strides are `strides` (row-major if None)."""
    shape = tuple(shape)
    strides = contiguous_strides(shape) if strides is None else tuple(strides)
    views = [view for view in views if math.prod(view.shape)]
    boxes = [_as_box(view, shape, strides) for view in views]
    if any(box is None for box in boxes):
        return _covered_elementwise(views, shape, strides)
    return _covered_in_cells([box for box in boxes if box is not None], shape)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How views cover a tensor.

    Attributes:
        exactly_once: whether every element is covered by exactly one view.
        gap: a range `(start, stop)` per dimension that bounds all uncovered elements; `None` if there are none.
        missing: the number of uncovered elements.
    """

    exactly_once: bool
    gap: tuple[tuple[int, int], ...] | None
    missing: int

    def __str__(self) -> str:
        if self.gap is None:
            return "complete"
        return f"[{', '.join(f'{start}:{stop}' for start, stop in self.gap)}] ({self.missing} elements)"


Box = tuple[tuple[int, int], ...]


def _as_box(view: ShapedView, shape: tuple[int, ...], strides: tuple[int, ...]) -> Box | None:
    """The view as `(start, stop)` per dimension of the tensor, in any order of dimensions; None if it is not a box."""
    order = sorted((dim for dim, size in enumerate(shape) if size > 1), key=lambda dim: -strides[dim])
    starts, remainder = [0] * len(shape), view.offset
    for dim in order:
        starts[dim], remainder = divmod(remainder, strides[dim])
    sizes = [1] * len(shape)
    dim_of_stride = {strides[dim]: dim for dim in order}
    for size, stride in zip(view.shape, view.strides, strict=True):
        if size == 1:
            continue
        dim = dim_of_stride.pop(stride, None)
        if dim is None:
            return None
        sizes[dim] = size
    box = tuple((start, start + size) for start, size in zip(starts, sizes, strict=True))
    inside = all(stop <= size for (_, stop), size in zip(box, shape, strict=True))
    return box if inside and remainder == 0 else None


def _covered_in_cells(boxes: list[Box], shape: tuple[int, ...]) -> Coverage:
    """Counts on the coarse grid that is drawn by the edges of the boxes: it has few cells, however large the tensor is."""
    edges = [sorted({0, size, *(edge for box in boxes for edge in box[dim])}) for dim, size in enumerate(shape)]
    index = [{edge: position for position, edge in enumerate(row)} for row in edges]
    counts = np.zeros([len(row) - 1 for row in edges], dtype=np.int32)
    for box in boxes:
        counts[tuple(slice(index[dim][start], index[dim][stop]) for dim, (start, stop) in enumerate(box))] += 1
    sizes = np.ones_like(counts, dtype=np.int64)
    for dim, row in enumerate(edges):
        sizes *= np.diff(row).reshape([-1 if other == dim else 1 for other in range(len(shape))])
    return _coverage(counts, sizes, edges)


def _covered_elementwise(views: list[ShapedView], shape: tuple[int, ...], strides: tuple[int, ...]) -> Coverage:
    storage = torch.zeros(1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)), dtype=torch.int8)
    for view in views:
        view.of(storage).add_(1)
    counts = storage.as_strided(shape, strides).numpy()
    return _coverage(counts, np.ones_like(counts, dtype=np.int64), [list(range(size + 1)) for size in shape])


def _coverage(counts: np.ndarray, sizes: np.ndarray, edges: list[list[int]]) -> Coverage:
    holes = np.argwhere(counts == 0)
    if not len(holes):
        return Coverage(bool((counts == 1).all()), None, 0)
    gap = tuple((row[low], row[high + 1]) for row, low, high in zip(edges, holes.min(0), holes.max(0), strict=True))
    return Coverage(False, gap, int(sizes[counts == 0].sum()))
