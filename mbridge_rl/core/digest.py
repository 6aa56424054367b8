"""Additive digests: they show that two tensors are equal although no process holds both, or all of either.

    digest(T) = sum over rows r of R[r] * sum over words w of row r of K[w] * T[r, w]      (mod 2^64)

A row is read as words of four bytes, little-endian and unsigned, the last one filled up with zeros. `R` are odd constants of 64
bits and `K` of 32, determined by the row's number and by the word's place in the row. So a digest depends on the place of every
byte, and the digests of disjoint pieces add up, in any process and in any order: bytes of a word that belong to another piece
count as zeros. A nonzero word times its constant is never 0 and fits 64 bits: no bit of a word is weaker than another. A digest
guards against mistakes and faults, not against an adversary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from mbridge_rl.core.digest_kernel import drawn, weigh, weigh_by_torch
from mbridge_rl.core.finite import EXPONENTS, is_finite

_WORD = 4
_BLOCK_BYTES = 1 << 24  # size of the blocks in which a part is copied, or widened to 64 bits, where that is needed
_WORD_SALT, _ROW_SALT = 1, 2
_UNSIGNED = {1: torch.uint8, 2: torch.uint16}  # dtype by bytes of an element, for rows that are not a sequence of full words


def digest(tensor: Tensor) -> int:
    """Digest of a full HF tensor, in [0, 2^64)."""
    shape = tuple(tensor.shape)
    return digest_strided(tensor, columns=shape[-1] if shape else 1, strides=contiguous_strides(shape))


def digest_strided(values: Tensor, *, columns: int, offset: int = 0, strides: Sequence[int]) -> int:
    """Digest of a part of an HF tensor, in [0, 2^64).

    Args:
        values: the part, of any strides, dtype and device; `values[i0, i1, ...]` is element
            `offset + i0*strides[0] + i1*strides[1] + ...` of the HF tensor in row-major order.
        columns: size of the HF tensor's last dimension.

    Raises:
        ValueError: `strides` do not fit `values`, are negative, or let the part wrap around the HF tensor's rows.
    """
    return _read(values, columns, offset, strides)[0]


def digest_and_look(values: Tensor, *, columns: int, offset: int = 0, strides: Sequence[int]) -> tuple[int, bool]:
    """Returns the digest as `digest_strided` does, and whether all values are finite, with a single read where the dtype
    allows."""
    exponent = EXPONENTS.get(values.dtype, 0) if values.device.type == "cpu" else 0
    value, carries = _read(values, columns, offset, strides, exponent)
    return value, not carries & (exponent << 1) & ~exponent if exponent else is_finite(values)


def combine(digests: Mapping[str, int]) -> str:
    """A short hex digest of the digests of named tensors, independent of the mapping's order."""
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
    """Where a part lies in its HF tensor, apart from the number of its first row.

    Attributes:
        dims: the part's dimensions, those along rows of the HF tensor first.
        rows: int64, the numbers of its rows, relative to the first.
        columns: int64, the numbers of its columns.
        size: bytes of an element.
    """

    dims: tuple[int, ...]
    rows: np.ndarray
    columns: np.ndarray
    size: int

    @cached_property
    def has_whole_words(self) -> bool:
        """Whether a row of the part is a sequence of full words."""
        per_word = max(1, _WORD // self.size)
        if per_word == 1:
            return True
        is_aligned = self.columns[0] % per_word == 0 and len(self.columns) % per_word == 0
        return bool(is_aligned and np.all(np.diff(self.columns) == 1))

    @cached_property
    def words(self) -> np.ndarray:
        """uint32, the constant of every word in a row of the part; only for rows of full words."""
        per_element = max(1, self.size // _WORD)
        elements = self.columns if self.size >= _WORD else self.columns[:: _WORD // self.size] * self.size // _WORD
        return _constants((elements[:, None] * per_element + np.arange(per_element)).reshape(-1))

    @cached_property
    def elements(self) -> np.ndarray:
        """uint64, the constant of every element in a row of the part: that of its word, shifted to its place in the word."""
        first_byte = self.columns * self.size
        return _constants(first_byte // _WORD).astype(np.uint64) << (8 * (first_byte % _WORD)).astype(np.uint64)

    @property
    def weights(self) -> np.ndarray:
        """uint64, the weights of a row in the form that `weigh_by_torch` takes."""
        return self.elements if self.size < _WORD else self.words.astype(np.uint64)


@lru_cache(maxsize=1024)
def _place(shape: Sequence[int], strides: Sequence[int], columns: int, first_column: int, size: int) -> _Place:
    row_dims = [dim for dim, stride in enumerate(strides) if shape[dim] > 1 and stride % columns == 0 and stride]
    column_dims = [dim for dim in range(len(shape)) if dim not in row_dims]
    column_dims.sort(key=lambda dim: (shape[dim] > 1, -strides[dim] if shape[dim] > 1 else 0))
    rows = _positions(shape, strides, row_dims) // columns
    cols = _positions(shape, strides, column_dims) + first_column
    if cols[-1] >= columns:
        raise ValueError(f"part {tuple(shape)} with strides {tuple(strides)} wraps around rows of {columns} columns")
    return _Place((*row_dims, *column_dims), rows, cols, size)


def _positions(shape: Sequence[int], strides: Sequence[int], dims: Sequence[int]) -> np.ndarray:
    positions = np.zeros(1, dtype=np.int64)
    for dim in dims:
        positions = (positions[:, None] + np.arange(shape[dim], dtype=np.int64) * strides[dim]).reshape(-1)
    return positions


def _constants(words: np.ndarray) -> np.ndarray:
    return (drawn(words, _WORD_SALT) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def _read(values: Tensor, columns: int, offset: int, strides: Sequence[int], exponent: int = 0) -> tuple[int, int]:
    """The digest, and the carries of exponents that `weigh` returns."""
    if len(strides) != values.dim():
        raise ValueError(f"{len(strides)} strides given for a part of {values.dim()} dimensions {tuple(values.shape)}")
    if columns < 1 <= values.numel() or min((offset, *strides)) < 0:
        raise ValueError(f"no tensor of {columns} columns has a part at {offset} with strides {tuple(strides)}")
    if values.numel() == 0:
        return 0, 0
    place = _place(tuple(values.shape), tuple(strides), columns, offset % columns, values.element_size())
    total, carries, first = 0, 0, 0
    for block in _matrices(values.detach().permute(place.dims), len(place.rows)):
        rows = place.rows[first : first + len(block)]
        first += len(block)
        if block.device.type == "cpu":
            block_digest, block_carries = _weighed(block, place, rows, offset // columns, exponent)
            total, carries = total + block_digest, carries | block_carries
        else:
            total += weigh_by_torch(block, place.weights, drawn(rows + offset // columns, _ROW_SALT))
    return unsigned(total), carries


def _matrices(part: Tensor, num_rows: int) -> Iterator[Tensor]:
    """Yields `part`, row dims first, as matrices `[rows, columns]` with contiguous columns; as views where its strides
    allow."""
    try:
        matrix = part.view(num_rows, -1)
    except RuntimeError:  # strides that no view can merge: split the outermost dimension
        if num_rows == 1:
            yield part.contiguous().view(1, -1)
            return
        for outer in part:
            yield from _matrices(outer, num_rows // len(part))
        return
    if part.device.type == "cpu" and matrix.stride(1) == 1:
        yield matrix
        return
    for block in matrix.split(max(1, _BLOCK_BYTES // (matrix.shape[1] * matrix.element_size()))):
        yield block.contiguous()


def _weighed(block: Tensor, place: _Place, rows: np.ndarray, first_row: int, exponent: int) -> tuple[int, int]:
    size, step = block.element_size(), block.stride(0) if len(rows) > 1 else block.shape[1]
    span = block.as_strided(((len(rows) - 1) * step + block.shape[1],), (1,))
    if place.has_whole_words and (block.storage_offset() * size) % _WORD == (step * size) % _WORD == 0:
        units, step, weights = span.view(torch.uint32), step * size // _WORD, place.words
    else:
        units, weights = span.view(_UNSIGNED[size]), place.elements
    lowest = exponent & ~(exponent << 1)
    return weigh(units.numpy(), step, weights, rows, first_row, _ROW_SALT, np.uint64(exponent), np.uint64(lowest))
