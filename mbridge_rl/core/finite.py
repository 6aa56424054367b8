"""Checks tensors for NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mbridge_rl.core.errors import NonFiniteWeights, listed

# A mask of the bits that are all set in values that are not finite, and only in those, repeated to fill four bytes: the
# exponent (in float8_e4m3fn, which has no infinity, exponent and mantissa).
EXPONENTS = {
    torch.float32: 0x7F80_0000,
    torch.bfloat16: 0x7F80_7F80,
    torch.float16: 0x7C00_7C00,
    torch.float8_e5m2: 0x7C7C_7C7C,
    torch.float8_e4m3fn: 0x7F7F_7F7F,
}


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not values.is_floating_point() or not values.numel():
        return True
    if values.element_size() == 1:  # torch has neither sum nor extrema for these dtypes
        values = values.to(torch.float32)
    # A sum of NaN or infinity is not finite, and takes half the time of extrema; but a sum of finite values may overflow.
    return math.isfinite(values.sum().item()) or all(map(math.isfinite, torch.stack(torch.aminmax(values)).tolist()))


def require_finite(tensors: Mapping[str, Tensor], rank: int) -> None:
    """Raises NonFiniteWeights if parameters hold NaN or infinity; the message names them."""
    refuse_nonfinite([name for name, tensor in tensors.items() if not is_finite(tensor)], rank)


def refuse_nonfinite(names: Collection[str], rank: int) -> None:
    """Raises NonFiniteWeights if there are any names."""
    if names:
        raise NonFiniteWeights(
            f"rank {rank}: {len(names)} parameters hold NaN or infinity: {listed(sorted(names))}. Nothing was committed, the "
            "engines serve the old version; WeightSync(nonfinite='pass') sends them all the same"
        )
