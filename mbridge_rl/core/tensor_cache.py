"""Tensors that cost work to make, and are asked for again and again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# What the workers of an engine are sent at about the same time comes from the same weights: a bucket of each of them fits.
RECENT_BYTES = 512 << 20


class TensorCache:
    """Makes a tensor when it is asked for, and keeps those that were asked for last.

    Args:
        make: the tensor of a name.
        max_bytes: of all that are kept; but one is in any case.
    """

    def __init__(self, make: Callable[[str], Tensor], max_bytes: int = RECENT_BYTES) -> None:
        self._make, self._max_bytes = make, max_bytes
        self._kept: dict[str, Tensor] = {}  # the one asked for last comes last

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._kept.pop(name) if name in self._kept else self._make(name)
        self._kept[name] = tensor
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self._max_bytes:
            del self._kept[next(iter(self._kept))]
        return tensor
