"""What counts as a policy with NaN or infinity."""

import pytest
import torch

from mbridge_rl.core.finite import is_finite

INFINITY, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("not_finite", [[NAN], [INFINITY], [-INFINITY], [INFINITY, -INFINITY]], ids=str)
def test_none_hides_among_others(dtype: torch.dtype, not_finite: list[float]) -> None:
    values = torch.randn(7, 515, dtype=dtype)
    assert is_finite(values)
    values[5, 100 : 100 + len(not_finite)] = torch.tensor(not_finite, dtype=dtype)
    assert not is_finite(values)
    assert not is_finite(values[:, ::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    values = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    assert not values.sum().isfinite()
    assert is_finite(values)


def test_bytes_and_nothing_are_finite() -> None:
    assert is_finite(torch.full((4,), 255, dtype=torch.uint8))
    assert is_finite(torch.empty(0))
    assert is_finite(torch.ones(3).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor([1.0, NAN]).to(torch.float8_e4m3fn))
