"""Code that the modules with the interfaces of other bridges share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mbridge_rl.core.errors import BridgeError


class NotOffered(BridgeError, NotImplementedError):
    """The other bridge has a feature that this one does not have."""


def refuse(where: str, given: Mapping[str, Any], harmless: Sequence[str] = ()) -> None:
    """Raises NotOffered if there are arguments that are neither empty nor `harmless`."""
    refused = {name: value for name, value in given.items() if value and name not in harmless}
    if refused:
        descriptions = ", ".join(f"{name}={value!r}" for name, value in refused.items())
        raise NotOffered(f"{where} does not offer {descriptions}; leave it out, or use mbridge_rl.AutoBridge itself")


def chunks_of(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    return [model] if isinstance(model, nn.Module) else list(model)


class HFStream(Iterator[tuple[str, Tensor]]):
    """An export that begins with its first tensor: `(hf_name, tensor)` on all ranks, or on those that `received_by` chooses.

    All ranks read it to its end. On a rank that receives nothing it ends without yielding, after the rank has sent its part.

    Args:
        start: starts the export; takes the ranks that receive, or `None` for all.
    """

    def __init__(self, start: Callable[[Sequence[int] | None], Iterator[tuple[str, Tensor]]]) -> None:
        self._start = start
        self._ranks: Sequence[int] | None = None
        self._stream: Iterator[tuple[str, Tensor]] | None = None

    def received_by(self, ranks: Sequence[int]) -> HFStream:
        """Makes only these ranks receive. All ranks call it with the same ranks, before the first tensor."""
        if self._stream is not None:
            raise BridgeError("this export is being read already: say who receives before its first tensor")
        self._ranks = tuple(ranks)
        return self

    def __next__(self) -> tuple[str, Tensor]:
        if self._stream is None:
            self._stream = self._start(self._ranks)
        return next(self._stream)
