"""The reference policy of a full-parameter run: a copy of the weights in host memory, swapped with the live ones on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mbridge_rl.megatron.model import unwrap


class ReferenceSnapshot:
    """A copy of the weights of a model at one moment; it takes host memory of the same size and no device memory."""

    def __init__(self, model: Sequence[nn.Module]) -> None:
        self._weights = [parameter.detach().to("cpu", copy=True) for parameter in _parameters(model)]

    @contextmanager
    def in_place_of(self, model: Sequence[nn.Module]) -> Iterator[None]:
        """Puts the snapshot into the model inside of the block; afterwards the model has its own weights again, in the same
        storage and bit for bit.

        Inside of the block the model's own weights are in the snapshot's memory: tensors are exchanged one at a time.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: Sequence[nn.Module]) -> None:
        for parameter, saved in zip(_parameters(model), self._weights, strict=True):
            live = parameter.detach().to("cpu", copy=True)
            parameter.copy_(saved)
            saved.copy_(live)


def _parameters(model: Sequence[nn.Module]) -> list[Tensor]:
    return [parameter for chunk in unwrap(model) for parameter in chunk.parameters()]
