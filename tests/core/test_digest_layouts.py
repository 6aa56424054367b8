"""Digests of parts, however they lie in memory and in their tensor, against the definition taken byte by byte."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import pytest
import torch
from digest_samples import constant, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mbridge_rl.core.digest import add, contiguous_strides, digest, digest_and_look, digest_strided

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64, torch.complex128),
]


@st.composite
def parts(draw: Any) -> tuple[Tensor, int, int, tuple[int, ...]]:
    """A box in a grid of elements, of which the last dims are columns: values, columns, offset and strides. In memory it has
    gaps, repeats elements, overlaps itself, or begins at any byte."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    spread = draw(st.sampled_from([1, 1, 2]))  # every other column
    grid = [size + draw(st.integers(0, 3)) for size in shape] + [spread]
    strides = contiguous_strides(grid)[:-1]
    columns = prod(grid[draw(st.integers(0, len(shape))) :])
    offset = sum(draw(st.integers(0, grid[dim] - size)) * strides[dim] for dim, size in enumerate(shape))
    offset += columns * draw(st.sampled_from([0, 7, 10**10]))

    in_memory, step = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        in_memory[dim] = draw(st.sampled_from([step, step, step, 0, 1, 3]))
        step *= shape[dim] + draw(st.integers(0, 2))
    first = draw(st.integers(0, 5))
    count = first + 1 + sum((size - 1) * step for size, step in zip(shape, in_memory, strict=True))
    start = 0 if dtype.is_complex else draw(st.integers(0, 7))  # torch itself crashes on complex numbers at odd places
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    highest = 2 if dtype == torch.bool else 256
    data = torch.randint(0, highest, (start + count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    elements = torch.frombuffer(bytearray(data.numpy().tobytes()), dtype=dtype, offset=start, count=count)
    return elements.as_strided(shape, in_memory, first), columns, offset, strides


def defined(values: Tensor, columns: int, offset: int, strides: tuple[int, ...]) -> int:
    total, size = 0, values.element_size()
    for index in itertools.product(*map(range, values.shape)):
        row, column = divmod(offset + sum(i * stride for i, stride in zip(index, strides, strict=True)), columns)
        element = values[index].clone().view(1).view(torch.uint8).tolist()
        for place, byte in enumerate(element, column * size):
            total += constant(row, 2) * (constant(place // 4, 1) >> 32 | 1) * (byte << 8 * (place % 4))
    return total % (1 << 64)


@settings(max_examples=150, deadline=None)
@given(parts())
def test_however_a_part_lies(part: tuple[Tensor, int, int, tuple[int, ...]]) -> None:
    values, columns, offset, strides = part
    expected = defined(*part)
    assert digest_strided(values, columns=columns, offset=offset, strides=strides) == expected
    digest_of_part, is_finite = digest_and_look(values, columns=columns, offset=offset, strides=strides)
    assert digest_of_part == expected
    if values.is_floating_point():
        assert is_finite == bool(values.double().isfinite().all())
    for dim, size in enumerate(values.shape):
        halves = (values.narrow(dim, 0, size // 2), 0), (values.narrow(dim, size // 2, size - size // 2), size // 2)
        shares = [
            digest_strided(half, columns=columns, offset=offset + at * strides[dim], strides=strides) for half, at in halves
        ]
        assert add(*shares) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_memory_may_begin_at_any_byte(dtype: torch.dtype) -> None:
    tensor = sample(dtype, 4, 6)
    data = tensor.view(torch.uint8).numpy().tobytes()
    for start in range(1, 8):
        moved = torch.frombuffer(bytearray(start) + data, dtype=dtype, offset=start).view(4, 6)
        assert digest(moved.requires_grad_()) == digest(tensor)


def test_threads_do_not_disturb_each_other() -> None:
    tensors = [sample(dtype, 57, 33, seed=seed) for seed in range(4) for dtype in DTYPES[:6]]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(digest, tensors * 5)) == [digest(tensor) for tensor in tensors] * 5
