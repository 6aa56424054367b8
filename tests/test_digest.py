"""Digests add up over any cut, and see every bit and every place."""

import itertools

import numpy as np
import pytest
import torch

from mbridge_rl.core.digest import add, combine, digest, digest_strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int32, torch.bool]


def sample(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 5).to(dtype)


def tiles(tensor: torch.Tensor, rows: list[int], columns: list[int]) -> int:
    width = tensor.shape[1]
    return add(
        *(
            digest_strided(tensor[a:b, c:d], columns=width, offset=a * width + c, strides=(width, 1))
            for (a, b), (c, d) in itertools.product(itertools.pairwise(rows), itertools.pairwise(columns))
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_add_up(dtype: torch.dtype) -> None:
    tensor = sample(dtype, 37, 48)
    whole = digest(tensor)
    assert 0 <= whole < 1 << 64
    assert tiles(tensor, [0, 11, 37], [0, 8, 40, 48]) == whole
    assert tiles(tensor, [0, 1, 2, 37], [0, 1, 7, 48]) == whole


def test_position_follows_the_strides_given() -> None:
    tensor = sample(torch.float32, 12, 10)
    whole = digest(tensor)
    assert digest_strided(tensor.t(), columns=10, strides=(1, 10)) == whole
    assert digest_strided(tensor.view(3, 4, 10).transpose(0, 1), columns=10, strides=(10, 40, 1)) == whole
    assert digest_strided(tensor.flatten().view(12, 5, 2), columns=10, strides=(10, 2, 1)) == whole
    assert digest_strided(tensor[::3], columns=10, strides=(30, 1)) != digest_strided(tensor[::3], columns=10, strides=(10, 1))


def test_large_rows_are_walked_in_pieces() -> None:
    tensor = sample(torch.bfloat16, 3, 200_001)
    assert tiles(tensor, [0, 2, 3], [0, 65_536, 65_537, 200_001]) == digest(tensor)


def test_products_of_8_bit_integers_are_exact() -> None:
    """What the processor's own instructions make of large blocks, against the definition, with the largest bytes."""
    tensor = torch.cat([torch.full((40, 5000), value, dtype=torch.int8) for value in (-128, 127, -1)], 1).view(torch.int32)
    halves = (tensor[:, :1000].contiguous(), tensor[:, 1000:])
    assert digest(tensor) == defined(tensor)
    assert add(
        digest_strided(halves[0], columns=3750, strides=(3750, 1)),
        digest_strided(halves[1], columns=3750, offset=1000, strides=(3750, 1)),
    ) == defined(tensor)


def defined(tensor: torch.Tensor) -> int:
    """The digest by its definition, in Python's integers."""
    data = tensor.view(torch.int8).numpy().astype(object)
    byte_constants = [constant_of_byte(place) for place in range(data.shape[1])]
    row_constants = [drawn(row, 2) for row in range(data.shape[0])]
    return int(np.array(row_constants, dtype=object) @ (data @ np.array(byte_constants, dtype=object))) % (1 << 64)


def constant_of_byte(place: int) -> int:
    bits = drawn(place, 1)
    return sum(((bits >> 8 * n & 127) - 64) * (drawn(n, 3) << (n > 0)) for n in range(4))


def drawn(place: int, salt: int) -> int:
    """splitmix64, made odd."""
    z = (4 * place + salt + 1) * 0x9E3779B97F4A7C15 % (1 << 64)
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ z >> 27) * 0x94D049BB133111EB % (1 << 64)
    return (z ^ z >> 31) | 1


@pytest.mark.parametrize("dtype", DTYPES[:5], ids=str)
def test_every_bit_and_every_swap_counts(dtype: torch.dtype) -> None:
    tensor = sample(dtype, 6, 8)
    whole = digest(tensor)
    bits = tensor.view(torch.uint8)
    for byte, bit in itertools.product(range(0, bits.numel(), 7), range(8)):
        bits.view(-1)[byte] ^= 1 << bit
        assert digest(tensor) != whole
        bits.view(-1)[byte] ^= 1 << bit
    assert digest(tensor[[1, 0, 2, 3, 4, 5]]) != whole
    assert digest(tensor.t()[[0, 1, 3, 2, 4, 5, 6, 7]].t()) != whole


def test_two_flipped_signs_do_not_cancel() -> None:
    tensor = sample(torch.float64, 4, 4)
    whole = digest(tensor)
    for (i, j), (k, m) in itertools.combinations(itertools.product(range(4), range(4)), 2):
        flipped = tensor.clone()
        flipped[i, j] *= -1
        flipped[k, m] *= -1
        assert digest(flipped) != whole


def test_signed_zero_and_nan_are_bits() -> None:
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    assert digest(torch.tensor([float("nan")])) == digest(torch.tensor([float("nan")]))


def test_misfits_are_refused() -> None:
    tensor = sample(torch.bfloat16, 4, 6)
    with pytest.raises(ValueError, match="strides given for a part of 2 dimensions"):
        digest_strided(tensor, columns=6, strides=(1,))
    with pytest.raises(ValueError, match="wraps around rows"):
        digest_strided(tensor.view(-1), columns=6, offset=1, strides=(1,))


def test_combined_digest_knows_names() -> None:
    assert combine({"a": 1, "b": 2}) == combine({"b": 2, "a": 1})
    assert combine({"a": 1, "b": 2}) != combine({"a": 2, "b": 1})


def test_empty_and_scalar() -> None:
    assert digest(torch.empty(0, 4)) == 0
    assert digest(torch.tensor(3.0)) == digest(torch.tensor([3.0]))
