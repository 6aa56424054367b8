"""A cache for tensors that are expensive to make and are used several times."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# The workers of an engine are sent pieces of the same weights at about the same time: a bucket of each worker fits into the
# cache.
RECENT_BYTES = 512 << 20


class TensorCache:
    """Makes a tensor when it is requested, and keeps the most recently requested ones.

    Args:
        make: makes the tensor of a name.
        max_bytes: most bytes of all tensors in the cache; the latest one is always kept.
    """

    def __init__(self, make: Callable[[str], Tensor], max_bytes: int = RECENT_BYTES) -> None:
        self._make, self._max_bytes = make, max_bytes
        self._tensors: dict[str, Tensor] = {}  # the most recently requested one is last

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors.pop(name) if name in self._tensors else self._make(name)
        self._tensors[name] = tensor
        while len(self._tensors) > 1 and sum(cached.nbytes for cached in self._tensors.values()) > self._max_bytes:
            del self._tensors[next(iter(self._tensors))]
        return tensor
