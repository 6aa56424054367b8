"""The trainer's end of deltas: the packed bytes that a rank sent last, and the changes from them to the next version."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mbridge_rl.sync.payload.delta import apply_changes, compressed_changes
from mbridge_rl.sync.payload.route import Part, Route, WorkerRoute


class DeltaSender:
    """Keeps the packed parts that one trainer rank sent last, and encodes what the next version changes in them.

    Args:
        route: the route of the sync.
        rank: the trainer rank.

    Attributes:
        base: the version that the next delta starts from, and the proofs of all workers; `None` if there is none.
    """

    def __init__(self, route: Route, rank: int) -> None:
        self._route, self._rank = route, rank
        self._held: dict[PartId, Tensor] = {}
        self._encoded: dict[PartId, Tensor] = {}
        self.base: tuple[int, list[str]] | None = None

    @property
    def parts(self) -> list[tuple[WorkerRoute, int, Part]]:
        """All parts of all trainer ranks, in the order of the sizes that `encode` returns."""
        return [
            (worker, index, part)
            for worker in self._route.workers
            for index, bucket in enumerate(worker.buckets)
            for part in bucket.parts
        ]

    def encode(self, pack: Pack) -> Tensor:
        """Encodes what changed in every part of this rank.

        Args:
            pack: writes a part as it is now.

        Returns:
            The bytes of every part as it will travel, int64 `[number of parts]`. The parts of other ranks are 0, so the sum
            over ranks has all sizes.
        """
        self._encoded = {}
        own_parts = [part for _, _, part in self._route.parts_of(self._rank)]
        scratch = torch.empty(max((part.nbytes for part in own_parts), default=0), dtype=torch.uint8)
        sizes = []
        for worker, index, part in self.parts:
            sizes.append(part.nbytes if part.source_rank == self._rank else 0)
            if part.source_rank != self._rank or not part.pieces:
                continue
            pack(worker, part, scratch[: part.nbytes])
            compressed = compressed_changes(part, self._held[worker.rank, index], scratch)
            if compressed is not None:
                self._encoded[worker.rank, index] = compressed
                sizes[-1] = compressed.numel()
        return torch.tensor(sizes, dtype=torch.int64)

    def take(self, worker: WorkerRoute, index: int) -> Tensor | None:
        """The encoded part; `None` if the part travels in full."""
        return self._encoded.get((worker.rank, index))

    def hold(self, worker: WorkerRoute, index: int, data: Tensor) -> None:
        """Remembers `data` (uint8 `[part.nbytes]`), a part that travels in full. It replaces the bytes that were sent last, so
        there is no base for a delta until the commit."""
        self.base = None
        if (worker.rank, index) not in self._held:
            self._held[worker.rank, index] = torch.empty(data.numel(), dtype=torch.uint8)
        self._held[worker.rank, index].copy_(data)

    def commit(self, version: int, proofs: Sequence[str]) -> None:
        """Makes `version` the base of the next delta.

        Args:
            proofs: the proofs of all workers.
        """
        for worker, index, part in self._route.parts_of(self._rank):
            if (data := self._encoded.get((worker.rank, index))) is not None:
                apply_changes(part, data, self._held[worker.rank, index])
        self._encoded, self.base = {}, (version, list(proofs))

    def abort(self) -> None:
        """Forgets the changes that were encoded last; the bytes that were sent last stay."""
        self._encoded = {}


PartId = tuple[int, int]  # worker, bucket index: a trainer rank has one part of a bucket


Pack = Callable[[WorkerRoute, Part, Tensor], None]
