"""Additive digests: equality of two tensors, proven from pieces that never meet.

    digest(T) = sum over rows r of R[r] * sum over columns c of C[c] * fold(T[r, c])      (mod 2^64)

`C` and `R` are odd constants drawn by splitmix64 (Steele, Lea, Flood 2014) from the column and the row, so that every value is
tied to its place in the HF tensor and the digests of disjoint pieces add up, whoever computes them and in whatever order.
`fold(x) = x ^ (x >> 32)` of a word's bits keeps the top bit of 8-byte words from cancelling: 2^63 times any odd constant is
2^63, so that two flipped signs would vanish; folded, each also flips bit 31, whose weight depends on its place. Shorter words
are their own fold. It guards against mistakes and faults, not against an adversary.

The word is one element, or `word_elements` neighbours read as one integer where both sides' cuts allow it (8-byte words are
several times faster on 2-byte dtypes).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_CHUNK_WORDS = 1 << 16  # 512 KiB of int64 temporaries: stays in a core's cache
_LOW_BITS = (1 << 32) - 1  # torch's shift is arithmetic, the mask makes it logical
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED_MASK = {2: 0xFFFF, 4: 0xFFFFFFFF}


def digest(tensor: Tensor, word_elements: int = 1) -> int:
    """Digest of a whole HF tensor, in [0, 2^64)."""
    shape, strides = tuple(tensor.shape), contiguous_strides(tensor.shape)
    return digest_strided(tensor, columns=_columns(shape), strides=strides, word_elements=word_elements)


def digest_strided(values: Tensor, *, columns: int, offset: int = 0, strides: Sequence[int], word_elements: int = 1) -> int:
    """Digest of a part of an HF tensor, in [0, 2^64).

    Args:
        values: the part, of any strides, dtype and device; `values[i0, i1, ...]` is element
            `offset + i0*strides[0] + i1*strides[1] + ...` of the HF tensor in row-major order.
        columns: size of the HF tensor's last dimension.
        word_elements: how many neighbours of a row form one word; both ends must use the same number.

    Raises:
        ValueError: `strides` don't fit `values`, cross rows unevenly, or words don't fit the part.
    """
    if len(strides) != values.dim():
        raise ValueError(f"{len(strides)} strides given for a part of {values.dim()} dimensions {tuple(values.shape)}")
    if values.numel() == 0:
        return 0
    if values.dim() == 0:
        values, strides = values.view(1), (1,)
    row_dims = [dim for dim, stride in enumerate(strides) if values.shape[dim] > 1 and stride % columns == 0 and stride]
    column_dims = [dim for dim in range(values.dim()) if dim not in row_dims]
    column_dims.sort(key=lambda dim: (values.shape[dim] > 1, -strides[dim] if values.shape[dim] > 1 else 0))
    rows = _positions(values.shape, strides, row_dims) // columns + offset // columns
    cols = _positions(values.shape, strides, column_dims) + offset % columns
    if cols[-1] >= columns:
        raise ValueError(f"part {tuple(values.shape)} with strides {tuple(strides)} wraps around rows of {columns} columns")
    matrix = values.permute(*row_dims, *column_dims)
    return _digest_matrix(matrix, rows, _word_columns(cols, columns, word_elements), word_elements)


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


def _columns(shape: Sequence[int]) -> int:
    return shape[-1] if shape else 1


def _positions(shape: Sequence[int], strides: Sequence[int], dims: Sequence[int]) -> np.ndarray:
    positions = np.zeros(1, dtype=np.int64)
    for dim in dims:
        positions = (positions[:, None] + np.arange(shape[dim], dtype=np.int64) * strides[dim]).reshape(-1)
    return positions


def _word_columns(cols: np.ndarray, columns: int, word_elements: int) -> np.ndarray:
    if word_elements == 1:
        return cols
    firsts = cols[::word_elements]
    whole = len(cols) % word_elements == 0 and columns % word_elements == 0 and not np.any(firsts % word_elements)
    if not whole or np.any(cols != np.repeat(firsts, word_elements) + np.tile(np.arange(word_elements), len(firsts))):
        raise ValueError(f"words of {word_elements} elements do not fit columns {cols[0]}..{cols[-1]} of {columns}")
    return firsts // word_elements


def _digest_matrix(matrix: Tensor, rows: np.ndarray, cols: np.ndarray, word_elements: int) -> int:
    """Sum over the words of `matrix`, whose dims are row dims then column dims, walked in cache-sized chunks."""
    device = matrix.device
    column_constants = _constants(cols, salt=1, device=device)
    row_constants = _constants(rows, salt=2, device=device)
    step = max(1, _CHUNK_WORDS // len(cols))
    total = torch.zeros((), dtype=torch.int64, device=device)
    first = 0
    for block in _row_blocks(matrix, len(rows), step):
        folded = _folded_words(block, word_elements)
        for start in range(0, len(cols), _CHUNK_WORDS):
            words = folded[:, start : start + _CHUNK_WORDS]
            row_sums = (words * column_constants[start : start + _CHUNK_WORDS]).sum(1)
            total += (row_sums * row_constants[first : first + len(words)]).sum()
        first += len(block)
    return int(total.item()) % (1 << 64)


def _row_blocks(matrix: Tensor, num_rows: int, step: int) -> list[Tensor]:
    """`matrix` as `[rows, ...]` views where its strides allow, else its leading index split first."""
    if num_rows == 1:
        return [matrix.reshape(1, -1)]
    try:
        flat = matrix.view(num_rows, -1)
    except RuntimeError:  # strides that no view can merge: split the outermost dimension
        return [part for outer in matrix for part in _row_blocks(outer, num_rows // len(matrix), step)]
    return list(flat.split(step))


def _folded_words(block: Tensor, word_elements: int) -> Tensor:
    """`[rows, words]` int64: the bit patterns, zero-extended and folded."""
    block = block.detach().contiguous()
    size = block.element_size() * word_elements
    if size not in _INTEGER_OF_SIZE:
        raise ValueError(f"{word_elements} elements of {block.dtype} are {size} bytes, no word of 1, 2, 4 or 8")
    if block.data_ptr() % size:  # a view of another dtype needs its alignment
        block = block.clone()
    words = block.view(_INTEGER_OF_SIZE[size])
    if size == 8:
        return words ^ ((words >> 32) & _LOW_BITS)
    words = words.to(torch.int64)
    return words & _UNSIGNED_MASK[size] if size > 1 else words


def _constants(positions: np.ndarray, salt: int, device: torch.device) -> Tensor:
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 == len(positions) and np.all(positions[1:] - positions[:-1] == 1):
        return _constant_run(first, last + 1, salt, device)
    return torch.from_numpy(_splitmix64(positions, salt)).to(device)


@lru_cache(maxsize=64)
def _constant_run(first: int, stop: int, salt: int, device: torch.device) -> Tensor:
    return torch.from_numpy(_splitmix64(np.arange(first, stop), salt)).to(device)


def _splitmix64(positions: np.ndarray, salt: int) -> np.ndarray:
    """Odd 64-bit constants, as the int64 with the same bits (torch multiplies modulo 2^64)."""
    with np.errstate(over="ignore"):
        z = positions.astype(np.uint64) * np.uint64(4) + np.uint64(salt)
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)
