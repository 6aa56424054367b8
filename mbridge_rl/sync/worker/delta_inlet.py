"""The worker's end of deltas: restores the full parts of the route from arriving changes and the weights that are served."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mbridge_rl.sync.payload import packing
from mbridge_rl.sync.payload.delta import _log, apply_changes
from mbridge_rl.sync.payload.route import Part, Piece, WorkerRoute
from mbridge_rl.sync.transports import Inlet


class DeltaInlet:
    """An inlet that hands over full parts, made of the changes that arrive and of the worker's parameters.

    Args:
        inlet: the inlet of the shrunk route (`payload.delta.shrunk`).
        route: the route of the sync.
        parameters: the parameters that the worker serves.
    """

    def __init__(self, inlet: Inlet, route: WorkerRoute, parameters: Mapping[str, Tensor]) -> None:
        self._inlet, self._route, self._parameters = inlet, route, parameters
        self._bucket = torch.empty(route.bucket_bytes, dtype=torch.uint8)  # the restored parts

    def take(self, index: int) -> Sequence[Tensor]:
        bucket = self._route.buckets[index]
        return [
            data if data.numel() == part.nbytes else self._restored(part, data, self._bucket[part.start - bucket.start :])
            for part, data in zip(bucket.parts, self._inlet.take(index), strict=True)
        ]

    def give_back(self, index: int) -> None:
        self._inlet.give_back(index)

    def fail(self) -> None:
        self._inlet.fail()

    def close(self) -> None:
        self._inlet.close()

    def _restored(self, part: Part, data: Tensor, into: Tensor) -> Tensor:
        """The full part, uint8 `[part.nbytes]`, made in `into` from the changes `data`."""

        def live_values(piece: Piece) -> Tensor:
            return packing.placed(piece.target, piece.shape, self._parameters)

        packing.pack(part, into, live_values)
        try:
            apply_changes(part, data.cpu(), into)
        except (ValueError, struct.error) as error:  # the digests refuse it at the end, when no sender waits for this worker
            source, worker = part.source_rank, self._route.rank
            _log.warning("changes from trainer rank %d to worker %d arrived damaged: %s", source, worker, error)
        return into[: part.nbytes]
