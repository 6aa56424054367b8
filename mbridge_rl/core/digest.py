"""Additive digests: equality of two tensors, proven from pieces that never meet.

    digest(T) = sum over rows r of R[r] * sum over bytes b of row r of K[b] * T[r, b]      (mod 2^64)

Bytes are signed; `R` and `K` are odd constants of the row and of the byte's place in it, drawn by splitmix64 (Steele, Lea,
Flood 2014). So every byte is tied to its place in the HF tensor, and the digests of disjoint pieces add up, whoever computes
them and in whatever order. A byte times an odd constant is never 0 modulo 2^64, and no bit of a byte is weaker than another. It
guards against mistakes and faults, not against an adversary.

`K[b] = sum over n < 4 of B[n] * W[n, b]`, where the `W` have 7 bits: each inner sum is four products of a matrix of 8-bit
integers with a vector, exact in 32 bits, for which processors have instructions (and 7 bits, because those without VNNI add two
products in 16 bits). What is left of 64-bit arithmetic is four numbers per row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul

import numpy as np
import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 21  # of a matrix at a time: stays in a core's cache
_LINE_BYTES = 1 << 15  # of a row at a time: 32768 products of 14 bits fit 32
_FEW_BYTES = 1 << 14  # below, preparing the product of 8-bit integers takes longer than the product

_Weights = tuple[Tensor, ...]


def digest(tensor: Tensor) -> int:
    """Digest of a whole HF tensor, in [0, 2^64)."""
    shape = tuple(tensor.shape)
    return digest_strided(tensor, columns=shape[-1] if shape else 1, strides=contiguous_strides(shape))


def digest_strided(values: Tensor, *, columns: int, offset: int = 0, strides: Sequence[int]) -> int:
    """Digest of a part of an HF tensor, in [0, 2^64).

    Args:
        values: the part, of any strides, dtype and device; `values[i0, i1, ...]` is element
            `offset + i0*strides[0] + i1*strides[1] + ...` of the HF tensor in row-major order.
        columns: size of the HF tensor's last dimension.

    Raises:
        ValueError: `strides` don't fit `values`, or cross rows unevenly.
    """
    if len(strides) != values.dim():
        raise ValueError(f"{len(strides)} strides given for a part of {values.dim()} dimensions {tuple(values.shape)}")
    if values.numel() == 0:
        return 0
    place = _place(tuple(values.shape), tuple(strides), columns, offset, values.element_size(), values.device)
    return _digest_matrix(values.detach().permute(place.dims), place)


def combine(digests: Mapping[str, int]) -> str:
    """One short hex digest of a set of named tensors' digests, independent of the mapping's order."""
    lines = "".join(f"{hf_name}\0{value:016x}\n" for hf_name, value in sorted(digests.items()))
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def add(*digests: int) -> int:
    """The digest of a union of disjoint parts."""
    return sum(digests) % (1 << 64)


def signed(value: int) -> int:
    """A digest as the int64 with the same bits, which tensors and collectives can carry."""
    return value - (1 << 64) if value >= 1 << 63 else value


def unsigned(value: int) -> int:
    """The inverse of `signed`."""
    return value % (1 << 64)


@dataclass(frozen=True)
class _Place:
    """Where a part lies in its HF tensor, as constants.

    Attributes:
        dims: of the part, those along rows of the HF tensor first.
        rows: int64, a constant for each row.
        lines: `W` of each byte of a row, cut into what is multiplied at a time: four times int8 `[bytes, 1]`.
        row_bytes: of the part.
    """

    dims: tuple[int, ...]
    rows: Tensor
    lines: tuple[_Weights, ...]
    row_bytes: int


@lru_cache(maxsize=1024)
def _place(shape: Sequence[int], strides: Sequence[int], columns: int, offset: int, size: int, device: torch.device) -> _Place:
    row_dims = [dim for dim, stride in enumerate(strides) if shape[dim] > 1 and stride % columns == 0 and stride]
    column_dims = [dim for dim in range(len(shape)) if dim not in row_dims]
    column_dims.sort(key=lambda dim: (shape[dim] > 1, -strides[dim] if shape[dim] > 1 else 0))
    rows = _positions(shape, strides, row_dims) // columns + offset // columns
    cols = _positions(shape, strides, column_dims) + offset % columns
    if cols[-1] >= columns:
        raise ValueError(f"part {tuple(shape)} with strides {tuple(strides)} wraps around rows of {columns} columns")
    step = max(1, _LINE_BYTES // size)
    lines = tuple(_weights(cols[start : start + step], size, device) for start in range(0, len(cols), step))
    return _Place((*row_dims, *column_dims), _row_constants(rows).to(device), lines, len(cols) * size)


def _positions(shape: Sequence[int], strides: Sequence[int], dims: Sequence[int]) -> np.ndarray:
    positions = np.zeros(1, dtype=np.int64)
    for dim in dims:
        positions = (positions[:, None] + np.arange(shape[dim], dtype=np.int64) * strides[dim]).reshape(-1)
    return positions


def _digest_matrix(matrix: Tensor, place: _Place) -> int:
    """Sum over `matrix`, whose dims are row dims then column dims, walked in cache-sized blocks."""
    total, first = 0, 0
    for block in _row_blocks(matrix, len(place.rows), max(1, _BLOCK_BYTES // place.row_bytes)):
        data, start = block.view(torch.int8), 0
        constants = place.rows[first : first + len(block)]
        for weights in place.lines:
            stop = start + len(weights[0])
            total += _weighted_sum(data if len(place.lines) == 1 else data[:, start:stop], weights, constants)
            start = stop
        first += len(block)
    return total % (1 << 64)


def _row_blocks(matrix: Tensor, num_rows: int, step: int) -> Iterator[Tensor]:
    """`matrix` as `[rows, columns]` with neighbouring columns, as views where its strides allow, a few rows at a time."""
    try:
        flat = matrix.view(num_rows, -1)
    except RuntimeError:  # strides that no view can merge: split the outermost dimension
        if num_rows == 1:
            yield matrix.contiguous().view(1, -1)
            return
        for outer in matrix:
            yield from _row_blocks(outer, num_rows // len(matrix), step)
        return
    for block in flat.split(step):
        yield block if block.stride(1) == 1 else block.clone(memory_format=torch.contiguous_format)


def _weighted_sum(data: Tensor, weights: _Weights, rows: Tensor) -> int:
    """Of the bytes of `data`, int8 `[rows, bytes]`, times the constants of their places and rows, modulo 2^64."""
    if data.device.type == "cpu" and data.numel() >= _FEW_BYTES:
        # what is small from here on is NumPy's, whose calls take a fraction of the time
        sums = np.concatenate([torch._int_mm(data, of_byte).numpy() for of_byte in weights], axis=1)
        return sum(map(mul, (rows.numpy() @ sums).tolist(), _BASES))
    constants = sum(of_byte[:, 0].to(torch.int64) * base for of_byte, base in zip(weights, _BASES, strict=True))
    return int(((data.to(torch.int64) * constants).sum(1) * rows).sum())


def _weights(cols: np.ndarray, size: int, device: torch.device) -> _Weights:
    """Of the bytes of these columns of elements of `size` bytes."""
    if cols[-1] - cols[0] + 1 == len(cols) and np.all(cols[1:] > cols[:-1]):
        return _weights_of_run(int(cols[0]) * size, (int(cols[-1]) + 1) * size, device)
    return _weights_at((cols[:, None] * size + np.arange(size)).reshape(-1), device)


@lru_cache(maxsize=64)
def _weights_of_run(first: int, stop: int, device: torch.device) -> _Weights:
    return _weights_at(np.arange(first, stop), device)


def _weights_at(places: np.ndarray, device: torch.device) -> _Weights:
    drawn = _splitmix64(places, salt=1)
    of_bytes = (((drawn >> np.uint64(8 * n)) & np.uint64(127)).astype(np.int8) - np.int8(64) for n in range(len(_BASES)))
    return tuple(torch.from_numpy(weights).unsqueeze(1).to(device) for weights in of_bytes)


def _row_constants(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(_splitmix64(rows, salt=2).view(np.int64))


def _splitmix64(positions: np.ndarray, salt: int) -> np.ndarray:
    """Odd 64-bit constants, uint64."""
    with np.errstate(over="ignore"):
        z = positions.astype(np.uint64) * np.uint64(4) + np.uint64(salt)
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (z ^ (z >> np.uint64(31))) | np.uint64(1)


# `B`: the first is odd and so is each first weight, the others are even: so every `K` is odd.
_BASES = tuple(signed(unsigned(int(drawn) << (n > 0))) for n, drawn in enumerate(_splitmix64(np.arange(4), salt=3)))
