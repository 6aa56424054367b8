"""A worker's end of deltas: parts as the route has them, made of the changes that arrive and of the weights that it serves."""

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
    """A worker's end: whole parts, made of what arrives and of what the worker holds.

    Args:
        inlet: over the shrunk route.
        route: of the sync.
        parameters: that the worker serves.
    """

    def __init__(self, inlet: Inlet, route: WorkerRoute, parameters: Mapping[str, Tensor]) -> None:
        self._inlet, self._route, self._parameters = inlet, route, parameters
        self._whole = torch.empty(route.bucket_bytes, dtype=torch.uint8)

    def take(self, index: int) -> Sequence[Tensor]:
        bucket = self._route.buckets[index]
        return [
            data if data.numel() == part.nbytes else self._restored(part, data, self._whole[part.start - bucket.start :])
            for part, data in zip(bucket.parts, self._inlet.take(index), strict=True)
        ]

    def give_back(self, index: int) -> None:
        self._inlet.give_back(index)

    def fail(self) -> None:
        self._inlet.fail()

    def close(self) -> None:
        self._inlet.close()

    def _restored(self, part: Part, data: Tensor, into: Tensor) -> Tensor:
        def held(piece: Piece) -> Tensor:
            return packing.placed(piece.target, piece.shape, self._parameters)

        packing.pack(part, into, held)
        try:
            apply_changes(part, data.cpu(), into)
        except (ValueError, struct.error) as error:  # the digests refuse it at the end, when no sender waits for this worker
            source, worker = part.source_rank, self._route.rank
            _log.warning("changes from trainer rank %d to worker %d arrived damaged: %s", source, worker, error)
        return into[: part.nbytes]
