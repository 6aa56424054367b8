"""NaN and infinity in a tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Bits that are all set in a value that is not finite, and in no other, for as many values as four bytes hold: the exponent (in
# float8_e4m3fn, which has no infinity, the mantissa belongs to them).
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
    if values.element_size() == 1:  # for which torch has neither sum nor extrema
        values = values.to(torch.float32)
    # NaN and infinity survive a sum, which takes half the time of extrema; but finite values may overflow it.
    return math.isfinite(values.sum().item()) or all(map(math.isfinite, torch.stack(torch.aminmax(values)).tolist()))
