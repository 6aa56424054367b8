"""Digests add up over any cut, and see every bit and every place."""

import itertools
import sys

import pytest
import torch
from digest_samples import constant, sample

from mbridge_rl.core.digest import _place, add, combine, digest, digest_and_look, digest_strided
from mbridge_rl.core.digest_kernel import compile_ahead, drawn, weigh, weigh_by_torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int32, torch.bool]


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
    full_digest = digest(tensor)
    assert 0 <= full_digest < 1 << 64
    assert tiles(tensor, [0, 11, 37], [0, 8, 40, 48]) == full_digest
    assert tiles(tensor, [0, 1, 2, 37], [0, 1, 7, 48]) == full_digest


def test_position_follows_the_strides_given() -> None:
    tensor = sample(torch.float32, 12, 10)
    full_digest = digest(tensor)
    assert digest_strided(tensor.t(), columns=10, strides=(1, 10)) == full_digest
    assert digest_strided(tensor.view(3, 4, 10).transpose(0, 1), columns=10, strides=(10, 40, 1)) == full_digest
    assert digest_strided(tensor.flatten().view(12, 5, 2), columns=10, strides=(10, 2, 1)) == full_digest
    assert digest_strided(tensor[::3], columns=10, strides=(30, 1)) != digest_strided(tensor[::3], columns=10, strides=(10, 1))


def test_large_rows_are_walked_in_pieces() -> None:
    tensor = sample(torch.bfloat16, 3, 200_001)
    assert tiles(tensor, [0, 2, 3], [0, 65_536, 65_537, 200_001]) == digest(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 3, 8, 13])
def test_every_way_to_compute_it_follows_the_definition(dtype: torch.dtype, columns: int) -> None:
    """The digest reads full words or single elements, at aligned or odd addresses, contiguous or not, or uses torch:
    all of these ways give the same number."""
    tensor = sample(dtype, 7, 2 * columns)
    assert digest(tensor) == defined(tensor)
    left, right = tensor[:, :columns], tensor[:, columns:]
    strides = (2 * columns, 1)
    for prepare in (lambda part: part, lambda part: part.contiguous(), lambda part: part.t().contiguous().t(), odd_place):
        parts = (prepare(left), 0), (prepare(right), columns)
        digests = [digest_strided(part, columns=2 * columns, offset=offset, strides=strides) for part, offset in parts]
        assert add(*digests) == defined(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_finds_the_same_sum(dtype: torch.dtype) -> None:
    """As on devices that Numba does not know."""
    tensor = sample(dtype, 5, 12)
    place = _place((5, 12), (12, 1), 12, 0, tensor.element_size())
    assert weigh_by_torch(tensor, place.weights, drawn(place.rows, 2)) % (1 << 64) == defined(tensor)


@pytest.mark.parametrize("largest", [0xFF, 0x80, 0x7F])
def test_largest_words_do_not_overflow_unseen(largest: int) -> None:
    tensor = torch.full((40, 5000), largest, dtype=torch.uint8).view(torch.float32)
    assert digest(tensor) == defined(tensor)


def odd_place(part: torch.Tensor) -> torch.Tensor:
    """A copy whose first element does not begin where a word does, if elements are smaller."""
    return torch.empty(part.numel() + 1, dtype=part.dtype)[1:].view(part.shape).copy_(part)


def defined(tensor: torch.Tensor) -> int:
    """The digest by its definition, in Python's integers."""
    rows = [row.contiguous().view(torch.uint8).numpy().tobytes() for row in tensor]
    return sum(constant(row, 2) * sum_of_words(data) for row, data in enumerate(rows)) % (1 << 64)


def sum_of_words(data: bytes) -> int:
    words = (int.from_bytes(data[start : start + 4], "little") for start in range(0, len(data), 4))
    return sum((constant(place, 1) >> 32 | 1) * word for place, word in enumerate(words))


@pytest.mark.parametrize("dtype", DTYPES[:5], ids=str)
def test_every_bit_and_every_swap_counts(dtype: torch.dtype) -> None:
    tensor = sample(dtype, 6, 8)
    original = digest(tensor)
    bits = tensor.view(torch.uint8)
    for byte, bit in itertools.product(range(0, bits.numel(), 7), range(8)):
        bits.view(-1)[byte] ^= 1 << bit
        assert digest(tensor) != original
        bits.view(-1)[byte] ^= 1 << bit
    assert digest(tensor[[1, 0, 2, 3, 4, 5]]) != original
    assert digest(tensor.t()[[0, 1, 3, 2, 4, 5, 6, 7]].t()) != original


def test_two_flipped_signs_do_not_cancel() -> None:
    tensor = sample(torch.float64, 4, 4)
    original = digest(tensor)
    for (i, j), (k, m) in itertools.combinations(itertools.product(range(4), range(4)), 2):
        flipped = tensor.clone()
        flipped[i, j] *= -1
        flipped[k, m] *= -1
        assert digest(flipped) != original


@pytest.mark.parametrize("dtype", [*DTYPES[:5], torch.float8_e5m2, torch.float8_e4m3fnuz], ids=str)
@pytest.mark.parametrize("columns", [6, 7])
def test_the_same_read_sees_what_is_not_finite(dtype: torch.dtype, columns: int) -> None:
    limits = torch.finfo(dtype)
    numbers = [0.0, limits.max, limits.min, limits.tiny, 1.0, -1.0, 2.0]
    fair = torch.tensor(numbers[:columns], dtype=torch.float64).to(dtype).expand(3, columns)
    assert digest_and_look(fair, columns=columns, strides=(columns, 1)) == (digest(fair), True)
    has_infinity = torch.isinf(torch.tensor(float("inf")).to(dtype).float())
    for not_finite in (float("nan"), *((float("inf"), -float("inf")) if has_infinity else ())):
        for row, column in itertools.product(range(3), range(columns)):
            values = fair.contiguous().clone()
            values[row, column] = not_finite
            for part in (values, values.t().contiguous().t()):
                assert digest_and_look(part, columns=columns, strides=(columns, 1)) == (digest(values), False)


def test_integers_are_finite() -> None:
    assert digest_and_look(torch.full((4,), -1), columns=4, strides=(1,))[1]


def test_signed_zero_and_nan_are_bits() -> None:
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    assert digest(torch.tensor([float("nan")])) == digest(torch.tensor([float("nan")]))


def test_misfits_are_refused() -> None:
    tensor = sample(torch.bfloat16, 4, 6)
    with pytest.raises(ValueError, match="strides given for a part of 2 dimensions"):
        digest_strided(tensor, columns=6, strides=(1,))
    with pytest.raises(ValueError, match="wraps around rows"):
        digest_strided(tensor.view(-1), columns=6, offset=1, strides=(1,))
    for place in (
        {"columns": 6, "strides": (6, -1)},
        {"columns": 6, "strides": (6, 1), "offset": -6},
        {"columns": 0, "strides": (6, 1)},
    ):
        with pytest.raises(ValueError, match=r"no tensor of . columns has a part at"):
            digest_strided(tensor, **place)


def test_combined_digest_knows_names() -> None:
    assert combine({"a": 1, "b": 2}) == combine({"b": 2, "a": 1})
    assert combine({"a": 1, "b": 2}) != combine({"a": 2, "b": 1})


def test_empty_and_scalar() -> None:
    assert digest(torch.empty(0, 4)) == 0
    assert digest(torch.tensor(3.0)) == digest(torch.tensor([3.0]))


def test_nothing_is_compiled_after_compile_ahead() -> None:
    compile_ahead()
    kinds = set(weigh.signatures)
    for dtype, columns in itertools.product(DTYPES, (4, 7)):
        digest_and_look(sample(dtype, 3, columns), columns=columns, strides=(columns, 1))
    assert set(weigh.signatures) == kinds


def test_a_module_that_looks_through_all_others_finds_nothing_odd() -> None:
    """As vLLM does when it starts on a CPU: it broke on llvmlite, which digests bring along."""
    for module in list(sys.modules.values()):
        for value in list(getattr(module, "__dict__", {}).values()):
            if str(type(value).__module__).startswith("llvmlite") and hasattr(value, "__dict__"):
                assert vars(value).get("kernel") is None
