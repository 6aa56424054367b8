"""Differences between two versions of a rectangle: exact for every dtype, in whatever strides."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mbridge_rl.core.plan import View
from mbridge_rl.sync.payload import difference as delta
from mbridge_rl.sync.payload.difference import Difference, Kind

DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8)


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits, NaNs and infinities among them."""
    numel = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(delta.integers(a.contiguous()), delta.integers(b.contiguous()))


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 7), min_size=0, max_size=4),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    st.integers(0, 1 << 20),
)
def test_differences_lead_there_and_back(dtype: torch.dtype, sizes: list[int], share: float, seed: int) -> None:
    shape = tuple(sizes)
    old, other = _random(shape, dtype, seed), _random(shape, dtype, seed + 1)
    changed = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    new = torch.where(changed, delta.integers(other), delta.integers(old)).view(dtype)
    difference = delta.difference(old, new)
    assert (difference.kind is Kind.SAME) == _same_bits(old, new)
    # The rectangle is a view of a larger tensor, with any strides. Elements between those of the view stay as they are.
    order = random.Random(seed).sample(range(len(shape)), len(shape))
    strides, step = [0] * len(shape), 2
    for dim in order:
        strides[dim] = step
        step *= shape[dim] + 1
    view, storage = View("", 3, tuple(strides)), _random((step + 8,), dtype, seed + 2)
    before = storage.clone()
    delta.integers(view.of(storage, shape)).copy_(delta.integers(old))
    start = storage.clone()
    delta.apply(difference, view, shape, storage)
    assert _same_bits(view.of(storage, shape), new)
    delta.apply(difference, view, shape, storage)
    assert _same_bits(storage, start)
    delta.integers(view.of(storage, shape)).copy_(delta.integers(view.of(before, shape)))
    assert _same_bits(storage, before)


def test_differences_that_are_none_are_named() -> None:
    with pytest.raises(ValueError, match="kind SPARSE has 5 bytes, expected 6"):
        Difference(Kind.SPARSE, 1, b"\0" * 5).values((4,), torch.bfloat16)
    with pytest.raises(ValueError, match="positions reach 9 in a rectangle of 4"):
        Difference(Kind.SPARSE, 1, b"\x09\0\0\0" + b"\0\0").values((4,), torch.bfloat16)
    with pytest.raises(ValueError, match="kind XOR has 7 bytes, expected 8"):
        Difference(Kind.XOR, 4, b"\0" * 7).values((4,), torch.bfloat16)
