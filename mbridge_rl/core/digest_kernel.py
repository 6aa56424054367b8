"""The inner loop of digests: compiled by Numba, about as fast as memory can be read; and in torch for other devices."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from llvmlite.binding import ffi
from numba import njit
from numba.extending import register_jitable
from torch import Tensor

# llvmlite's wrapper of LLVM's library returns an object for every attribute, even for `__dict__`, where it is no dictionary.
# vLLM 0.32 fails on it when it starts on a CPU and inspects all imported modules.
with contextlib.suppress(AttributeError):
    ffi.lib._fntab.setdefault("__dict__", {})


@register_jitable
def drawn(positions: Any, salt: int) -> Any:
    """Odd constants of 64 bits, one per position (an integer, or an array of them): splitmix64 (Steele, Lea, Flood 2014)."""
    z = (np.uint64(positions) * np.uint64(4) + np.uint64(salt + 1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


@njit(nogil=True)
def weigh(
    units: np.ndarray,
    step: int,
    weights: np.ndarray,
    rows: np.ndarray,
    first_row: int,
    salt: int,
    exponent: np.uint64,
    lowest: np.uint64,
) -> tuple[np.uint64, np.uint64]:
    """Sums a matrix of unsigned integers, each times the weight of its column and the constant of its row, modulo 2^64.

    Args:
        units: `[at least (len(rows) - 1) * step + len(weights)]`, contiguous: rows start `step` apart.
        weights: the weights of the columns.
        rows: the rows' numbers; `drawn(number + first_row, salt)` is a row's constant.
        exponent: a mask of the bits that are all set in a value that is not finite, for every value in a unit.
        lowest: the lowest bit of each value's mask: added to the masked bits, it carries into the bit above where all are set.

    Returns:
        The sum, and the bitwise or of all carries.
    """
    total, carries = np.uint64(0), np.uint64(0)
    columns = len(weights)
    for row in range(len(rows)):
        data = units[row * step : row * step + columns]
        row_sum = np.uint64(0)
        for column in range(columns):
            unit = np.uint64(data[column])
            row_sum += unit * np.uint64(weights[column])
            carries |= (unit & exponent) + lowest
        total += row_sum * drawn(rows[row] + first_row, salt)
    return total, carries


def compile_ahead() -> None:
    """Compiles `weigh`, once in a process. It takes half a second, for which an engine would otherwise wait at its first
    digest."""
    for unit, weight in ((np.uint32, np.uint32), (np.uint16, np.uint64), (np.uint8, np.uint64)):
        zero = np.uint64(0)
        weigh(np.zeros(1, unit), 1, np.zeros(1, weight), np.zeros(1, np.int64), 0, 0, zero, zero)


def weigh_by_torch(block: Tensor, weights: np.ndarray, row_constants: np.ndarray) -> int:
    """The sum that `weigh` computes, as a signed integer, on the device of `block` (contiguous, `[rows, columns]`).

    Args:
        weights: uint64, one per unit; a unit is an element, or a word of an element that is larger than 4 bytes.
        row_constants: uint64, the rows' constants, by `drawn`.
    """
    size = min(block.element_size(), 4)
    units = block.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]).to(torch.int64) & ((1 << 8 * size) - 1)
    columns, rows = (torch.from_numpy(factors.view(np.int64)).to(block.device) for factors in (weights, row_constants))
    return int(((units * columns).sum(1) * rows).sum())
