"""Values to take digests of, and the constants of digests, computed another way."""

from __future__ import annotations

import torch


def sample(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 5).to(dtype)


def constant(place: int, salt: int) -> int:
    """splitmix64, made odd."""
    z = (4 * place + salt + 1) * 0x9E3779B97F4A7C15 % (1 << 64)
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ z >> 27) * 0x94D049BB133111EB % (1 << 64)
    return (z ^ z >> 31) | 1
