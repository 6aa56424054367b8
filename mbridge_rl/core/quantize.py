"""Quantized weights as a model of their own: fp8 (e4m3) with a scale for every block, or for the full tensor.

A trainer rank quantizes its own weights before they are sent. `X.weight` becomes fp8 on the same segments, and
`X.weight_scale_inv` (one fp32 number per 128x128 block, as in DeepSeek-V3's checkpoints) or `X.weight_scale` (one number) is a
second tensor. A block may lie on several ranks, since cuts by heads or experts' widths need not follow blocks. Its largest
magnitude is then the maximum over these ranks, which is exact, so that the result is bit for bit that of one process with the
full tensor.

    scale = max |block| / 448            quantized = round_to_e4m3(weight / scale)            weight ~ quantized * scale
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mbridge_rl.core.adapter_targets import is_linear
from mbridge_rl.core.digest import contiguous_strides
from mbridge_rl.core.errors import UnsupportedModelError
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import Rule, replicated
from mbridge_rl.core.segments import Box, Segment, Shape, Side
from mbridge_rl.core.typed_values import AtLeastOne

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max  # 448


@dataclass(frozen=True)
class Fp8:
    """Weights of linear layers in fp8; embeddings, output layers, routers, norms and biases are not quantized.

    Attributes:
        block: number of rows and columns that share a scale; `None` makes one scale per tensor.
    """

    block: tuple[AtLeastOne, AtLeastOne] | None = (128, 128)

    @property
    def suffix(self) -> str:
        """The suffix that makes a scale's name from its weight's name."""
        return "_scale_inv" if self.block else "_scale"

    def scale_shape(self, shape: Shape) -> Shape:
        """The shape of the scales of a weight `[rows, columns]`."""
        return tuple(-(-size // step) for size, step in zip(shape, self.block, strict=True)) if self.block else (1,)

    def blocks(self, positions: np.ndarray, dim: int) -> np.ndarray:
        """The index of the block of each row (`dim` 0) or column (`dim` 1)."""
        return positions // self.block[dim] if self.block else np.zeros_like(positions)


def quantized_spec(spec: ModelSpec, scheme: Fp8) -> ModelSpec:
    """The model with its linears' weights in fp8 and a scale tensor after each.

    Raises:
        UnsupportedModelError: a linear is part of a stacked HF tensor, for which the format does not exist.
    """
    rules: list[Rule] = []
    for rule in spec.rules:
        if not _is_quantized(rule):
            rules.append(rule)
            continue
        rules += [replace(rule, dtype=FP8), *_scale_rules(rule, scheme)]
    return replace(spec, rules=tuple(rules))


def scale_names(spec: ModelSpec, scheme: Fp8) -> dict[str, str]:
    """`{hf_name of a weight: hf_name of its scales}` of a quantized spec."""
    return {name: name + scheme.suffix for name in spec.hf_shapes if name + scheme.suffix in spec.hf_shapes}


def maxima(spec: ModelSpec, scheme: Fp8, side: Side, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The largest magnitude of every block among one rank's elements, fp32 `{scale name: [*scale shape]}`; 0 where the rank has
    none.

    Args:
        spec: a quantized spec.
        side: the side of this rank (`segments.megatron_side` of the quantized spec).
        live: this rank's tensors in the trainer's dtype.
    """
    names = scale_names(spec, scheme)
    largest = {scale: torch.zeros(spec.hf_shapes[scale]) for scale in names.values()}
    for segment in side.segments:
        if segment.hf_name in names:
            grid = _Grid.of(spec, scheme, segment)
            maximum = largest[names[segment.hf_name]].view(grid.scale_grid)
            _update_maximum(maximum, grid, grid.matrix(live[segment.local_name]))
    return largest


def scales(largest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scales, from the maxima over all ranks; 1 where a block is zero."""
    return {name: torch.where(value == 0, 1.0, value / _LARGEST) for name, value in largest.items()}


def quantized(spec: ModelSpec, scheme: Fp8, segments: list[Segment], values: Tensor, scale_of: Mapping[str, Tensor]) -> Tensor:
    """Quantizes one local tensor to fp8, in the same shape.

    Args:
        segments: the segments of this local tensor.
        scale_of: the scales, by scale name.
    """
    result = torch.zeros(values.shape, dtype=FP8, device=values.device)
    names = scale_names(spec, scheme)
    for segment in segments:
        grid = _Grid.of(spec, scheme, segment)
        scale = scale_of[names[segment.hf_name]].view(grid.scale_grid).to(values.device)
        grid.put(_rounded(grid, grid.matrix(values), scale), result)
    return result


def quantize(weight: Tensor, scheme: Fp8) -> tuple[Tensor, Tensor]:
    """Quantizes a full weight: `(fp8 [rows, columns], scales)`. Every layout gives the same result."""
    segment = Segment("", Box((0,) * weight.dim(), tuple(weight.shape)), "", 0, contiguous_strides(weight.shape), (0,))
    grid = _Grid.of_shape(tuple(weight.shape), tuple(weight.shape), scheme, segment)
    largest = torch.zeros(scheme.scale_shape(tuple(weight.shape)))
    _update_maximum(largest.view(grid.scale_grid), grid, grid.matrix(weight))
    scale = scales({"": largest})[""]
    return _rounded(grid, grid.matrix(weight), scale.view(grid.scale_grid)), scale


def dequantize(weight: Tensor, scale: Tensor, scheme: Fp8, dtype: torch.dtype) -> Tensor:
    """`weight * scale`, computed in fp32 and cast to `dtype`."""
    if scheme.block is None:
        return (weight.float() * scale).to(dtype)
    rows, columns = weight.shape
    wide = scale.repeat_interleave(scheme.block[0], 0)[:rows].repeat_interleave(scheme.block[1], 1)[:, :columns]
    return (weight.float() * wide).to(dtype)


@dataclass(frozen=True)
class _Grid:
    """A segment as a matrix of rows and columns of its HF tensor, with their blocks.

    Attributes:
        order: the segment's dims, those along rows first.
        row_blocks, column_blocks: the block of every row and of every column of the matrix.
        scale_grid: the two-dimensional shape of the tensor's scales.
    """

    segment: Segment
    order: tuple[int, ...]
    row_blocks: np.ndarray
    column_blocks: np.ndarray
    scale_grid: tuple[int, int]

    @classmethod
    def of(cls, spec: ModelSpec, scheme: Fp8, segment: Segment) -> _Grid:
        return cls.of_shape(spec.hf_shapes[segment.hf_name], spec.hf_grid(segment.hf_name), scheme, segment)

    @classmethod
    def of_shape(cls, shape: Shape, grid: Shape, scheme: Fp8, segment: Segment) -> _Grid:
        columns, strides, box = shape[1], contiguous_strides(grid), segment.box
        row_dims = tuple(dim for dim, stride in enumerate(strides) if stride % columns == 0)
        column_dims = tuple(dim for dim in range(len(grid)) if dim not in row_dims)
        rows = _positions(box.start, box.size, strides, row_dims) // columns
        cols = _positions(box.start, box.size, strides, column_dims)
        scale_shape = scheme.scale_shape(shape)
        scale_grid = scale_shape if len(scale_shape) == 2 else (1, 1)
        return cls(segment, row_dims + column_dims, scheme.blocks(rows, 0), scheme.blocks(cols, 1), scale_grid)

    def matrix(self, tensor: Tensor) -> Tensor:
        """The segment's elements in `tensor` as a matrix `[rows, columns]`."""
        return self._view(tensor).permute(self.order).reshape(len(self.row_blocks), len(self.column_blocks))

    def put(self, matrix: Tensor, tensor: Tensor) -> None:
        """Writes a matrix of the segment's elements into `tensor`; the inverse of `matrix`."""
        target = self._view(tensor).permute(self.order)
        target.copy_(matrix.view(target.shape))

    def _view(self, tensor: Tensor) -> Tensor:
        segment = self.segment
        return tensor.as_strided(segment.box.size, segment.strides, tensor.storage_offset() + segment.offset)


def _update_maximum(maximum: Tensor, grid: _Grid, matrix: Tensor) -> None:
    """Raises `maximum [row blocks, column blocks]` to the matrix's magnitudes where these are larger."""
    for row, rows in _runs(grid.row_blocks):
        magnitudes = matrix[rows].abs().amax(0)
        for column, columns in _runs(grid.column_blocks):
            maximum[row, column] = torch.maximum(maximum[row, column], magnitudes[columns].amax().float().cpu())


def _rounded(grid: _Grid, matrix: Tensor, scale: Tensor) -> Tensor:
    """The matrix divided by its scales and rounded to fp8."""
    result = torch.empty(matrix.shape, dtype=FP8, device=matrix.device)
    columns = torch.from_numpy(grid.column_blocks).to(matrix.device)
    for row, rows in _runs(grid.row_blocks):  # a row of blocks at a time bounds the fp32 copy
        result[rows] = (matrix[rows].float() / scale[row][columns]).clamp(-_LARGEST, _LARGEST).to(FP8)
    return result


def _runs(blocks: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Yields `(block, slice)` for every run of consecutive places in one block."""
    edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(blocks)]
    for start, stop in pairwise(edges):
        if start < stop:
            yield int(blocks[start]), slice(start, stop)


def _positions(starts: Shape, sizes: Shape, strides: Shape, dims: tuple[int, ...]) -> np.ndarray:
    positions = np.zeros(1, dtype=np.int64)
    for dim in dims:
        positions = (positions[:, None] + (starts[dim] + np.arange(sizes[dim], dtype=np.int64)) * strides[dim]).reshape(-1)
    return positions


def _is_quantized(rule: Rule) -> bool:
    return rule.placement == "layer" and is_linear(rule) and ".router." not in rule.megatron_name


def _scale_rules(rule: Rule, scheme: Fp8) -> list[Rule]:
    parts = {part.hf_name: part for part in rule.parts}
    stacked = [part for part in parts.values() if len(part.shape) != 2 or not part.hf_name.endswith(".weight")]
    if stacked:
        raise UnsupportedModelError(
            f"{rule.megatron_name} is made of {stacked[0].hf_name} {list(stacked[0].shape)}: fp8 with scales exists for the "
            f"weights of single linears only"
        )
    return [
        replace(
            replicated(f"{name}{scheme.suffix}", f"{name}{scheme.suffix}", scheme.scale_shape(part.shape), dtype=torch.float32),
            placement=rule.placement,
            layers=rule.layers,
        )
        for name, part in parts.items()
    ]
