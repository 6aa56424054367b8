"""An engine as a side of a plan: the parameters that its workers describe, as segments in HF coordinates.

A worker describes itself once per start (`messages.WorkerDescription`): its own loader copies which strided view of which HF
tensor into which strided view of which parameter. This module does not know how an engine fuses, pads or distributes tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from mbridge_rl.core.digest import contiguous_strides
from mbridge_rl.core.errors import EngineMismatch, listed
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.segments import Box, Segment, Shape, Side
from mbridge_rl.sync.payload.landing import Landing
from mbridge_rl.sync.payload.messages import WorkerDescription

UNSPLIT_TENSOR = "hf_tensor:"  # prefix of the local names of tensors that only a worker's own loader can place


def alike(first: Sequence[WorkerDescription], second: Sequence[WorkerDescription]) -> bool:
    """Whether two engines have the same layout, by the descriptions of their workers; their hosts may differ."""
    first_layout, second_layout = ([replace(worker, host="") for worker in workers] for workers in (first, second))
    return first_layout == second_layout


def engine_side(spec: ModelSpec, workers: Sequence[WorkerDescription], dtypes: Mapping[str, torch.dtype]) -> Side:
    """The parameters of the workers of one engine; each worker is a rank of the side. A tensor that only a worker's loader can
    place is one segment: the complete HF tensor, under the local name `hf_tensor:<hf_name>`.

    Args:
        spec: the spec of the model.
        workers: the descriptions of all workers.
        dtypes: the dtypes of the HF tensors, for those that only a loader can place.

    Raises:
        EngineMismatch: workers are missing, or no worker has a place for a tensor of the model.
    """
    ranks = sorted(worker.rank for worker in workers)
    if not workers or ranks != list(range(workers[0].size)):
        raise EngineMismatch(f"an engine of {workers[0].size if workers else 0} workers needs all of them, found {ranks}")
    segments: list[Segment] = []
    shapes: dict[str, Shape] = {}
    holders: dict[str, set[int]] = {}
    for hf_name, hf_shape in spec.hf_shapes.items():
        grid = spec.hf_grid(hf_name)
        for worker in workers:
            worker_segments = [
                Segment(hf_name, box, landing.parameter_name, offset, strides, (worker.rank,))
                for landing in worker.landings.get(hf_name, ())
                for box, offset, strides in boxes_of(landing, grid)
            ]
            if hf_name in worker.unsplit:
                box = Box((0,) * len(grid), grid)
                name = UNSPLIT_TENSOR + hf_name
                worker_segments = [Segment(hf_name, box, name, 0, contiguous_strides(grid), (worker.rank,))]
                shapes[name] = hf_shape
            for segment in worker_segments:
                holders.setdefault(segment.local_name, set()).add(worker.rank)
                if segment.local_name in worker.parameters:
                    shapes[segment.local_name] = worker.parameters[segment.local_name][1]
            segments += worker_segments
    placed_names = {segment.hf_name for segment in segments} | spec.optional_hf_names
    if missing_names := [hf_name for hf_name in spec.hf_shapes if hf_name not in placed_names]:
        raise EngineMismatch(f"no worker of the engine has a place for {listed(missing_names)}; is it another model?")
    return Side(tuple(segments), shapes, {name: tuple(sorted(ranks)) for name, ranks in holders.items()})


def local_dtypes(workers: Sequence[WorkerDescription], dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """The dtype of every local tensor of the side: of the parameters, and of the HF tensors that only a loader can place."""
    parameter_dtypes = {name: dtype for worker in workers for name, (dtype, _) in worker.parameters.items()}
    return parameter_dtypes | {UNSPLIT_TENSOR + hf_name: dtypes[hf_name] for worker in workers for hf_name in worker.unsplit}


def boxes_of(landing: Landing, grid: Shape) -> Iterator[tuple[Box, int, Shape]]:
    """The source view of a landing as boxes in the factored shape `grid` of its HF tensor, with their places in the parameter.

    Yields:
        `(box, offset, strides)`: element `box.start + i` lies at `offset + i . strides` of the parameter.
    """
    source, target = landing.source, landing.target
    dims = list(zip(source.shape, source.strides, target.strides, strict=True))
    yield from _boxes(dims, source.offset, target.offset, grid, contiguous_strides(grid))


_Dim = tuple[int, int, int]  # size, stride in the HF tensor, stride in the parameter


def _boxes(dims: list[_Dim], source: int, target: int, grid: Shape, steps: Shape) -> Iterator[tuple[Box, int, Shape]]:
    if any(size == 0 for size, _, _ in dims):
        return
    dims = [dim for dim in dims if dim[0] > 1]
    start = [source // step % extent for step, extent in zip(steps, grid, strict=True)]
    size, strides = [1] * len(grid), [0] * len(grid)
    for position, (count, stride, to_stride) in enumerate(dims):
        axis = next((axis for axis, step in enumerate(steps) if step == stride and grid[axis] > 1), None)
        if axis is None or size[axis] > 1 or start[axis] + count > grid[axis]:
            others = [*dims[:position], *dims[position + 1 :]]
            for piece, skipped in _split(dims[position], axis, start, grid):
                moved = (source + skipped * stride, target + skipped * to_stride)
                yield from _boxes([*others, *piece], *moved, grid, steps)
            return
        size[axis], strides[axis] = count, to_stride
    yield Box(tuple(start), tuple(size)), target, tuple(strides)


def _split(dim: _Dim, axis: int | None, start: Sequence[int], grid: Shape) -> Iterator[tuple[list[_Dim], int]]:
    """The pieces of a dimension that is not a range of one axis, as `(dimensions, entries skipped)`: one up to the end of the
    axis, one of complete runs of the axis, and one of the remaining entries; or single entries, if it follows no axis."""
    count, stride, to_stride = dim
    if axis is None or (start[axis] + count <= grid[axis]):
        yield from (([], entry) for entry in range(count))
        return
    extent = grid[axis]
    head = (extent - start[axis]) % extent
    runs = (count - head) // extent
    if head:
        yield [(head, stride, to_stride)], 0
    if runs:
        yield [(runs, stride * extent, to_stride * extent), (extent, stride, to_stride)], head
    if tail := count - head - runs * extent:
        yield [(tail, stride, to_stride)], head + runs * extent


def kept_bytes(worker: WorkerDescription) -> int:
    """The bytes of a worker's parameters that landings write, which is what a sync must bring to the worker."""
    return sum(
        prod(part.target.shape) * worker.parameters[part.parameter_name][0].itemsize
        for parts in worker.landings.values()
        for part in parts
    )
