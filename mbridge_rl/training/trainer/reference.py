"""The reference policy of a full-parameter run: a copy of the weights in host memory, swapped with the live ones on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mbridge_rl.megatron.model import unwrap


class ReferenceSnapshot:
    """The weights of a model as they were; costs host memory of the same size and no device memory."""

    def __init__(self, model: Sequence[nn.Module]) -> None:
        self._weights = [parameter.detach().to("cpu", copy=True) for parameter in _parameters(model)]

    @contextmanager
    def in_place_of(self, model: Sequence[nn.Module]) -> Iterator[None]:
        """The model holds the snapshot within, and its own weights afterwards, in the same storage and bit for bit.

        Meanwhile its own weights wait where the snapshot was: one tensor at a time is copied twice.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: Sequence[nn.Module]) -> None:
        for parameter, kept in zip(_parameters(model), self._weights, strict=True):
            live = parameter.detach().to("cpu", copy=True)
            parameter.copy_(kept)
            kept.copy_(live)


def _parameters(model: Sequence[nn.Module]) -> list[Tensor]:
    return [parameter for chunk in unwrap(model) for parameter in chunk.parameters()]
