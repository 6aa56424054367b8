"""Tensors that are made when they are asked for: which of them are made again."""

from __future__ import annotations

import torch
from torch import Tensor

from mbridge_rl.core.tensor_cache import TensorCache


def test_what_was_asked_for_last_is_kept() -> None:
    made: list[str] = []

    def make(name: str) -> Tensor:
        made.append(name)
        return torch.full((int(name[1:]),), 1, dtype=torch.uint8)

    recent = TensorCache(make, max_bytes=10)
    for name in ("a4", "b4", "a4", "b4", "a4"):
        assert len(recent[name]) == 4
    assert made == ["a4", "b4"]
    assert len(recent["c4"]) == 4  # in the place of b, which was asked for before a
    assert recent["a4"] is recent["a4"]
    assert made == ["a4", "b4", "c4"]
    assert len(recent["d11"]) == 11  # alone too large, and yet kept
    assert recent["d11"] is recent["d11"]
    assert len(recent["a4"]) == 4
    assert made == ["a4", "b4", "c4", "d11", "a4"]
