"""A trainer rank's end of deltas: what its workers hold of it, packed, and what the next version changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mbridge_rl.sync.payload.delta import apply_changes, compressed_changes
from mbridge_rl.sync.payload.route import Part, Route, WorkerRoute


class DeltaSender:
    """One trainer rank's end: what its workers hold of it, packed, and what the next version changes.

    Args:
        route: of the sync.
        rank: of the trainer.
    """

    def __init__(self, route: Route, rank: int) -> None:
        self._route, self._rank = route, rank
        self._held: dict[PartId, Tensor] = {}
        self._encoded: dict[PartId, Tensor] = {}
        self._sent: Mapping[int, WorkerRoute] = {}
        self.base: tuple[int, list[str]] | None = None

    @property
    def parts(self) -> list[tuple[WorkerRoute, int, Part]]:
        """All parts of all trainer ranks, in the order of their sizes."""
        return [
            (worker, index, part)
            for worker in self._route.workers
            for index, bucket in enumerate(worker.buckets)
            for part in bucket.parts
        ]

    def encode(self, pack: Pack) -> Tensor:
        """Finds what changed in every part of this rank; `pack` writes a part as it is now.

        Returns:
            Bytes of every part as it will travel, int64 `[number of parts]`, 0 where other ranks have it: ranks add theirs up.
        """
        self._encoded = {}
        mine = [part for _, _, part in self._route.parts_of(self._rank)]
        scratch = torch.empty(max((part.nbytes for part in mine), default=0), dtype=torch.uint8)
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
        """The encoded part; `None` where it goes whole."""
        return self._encoded.get((worker.rank, index))

    def hold(self, worker: WorkerRoute, index: int, data: Tensor) -> None:
        """A part went whole, as `data`. What was held of it is gone: until the commit there is nothing to start from."""
        self.base = None
        if (worker.rank, index) not in self._held:
            self._held[worker.rank, index] = torch.empty(data.numel(), dtype=torch.uint8)
        self._held[worker.rank, index].copy_(data)

    def commit(self, version: int, proofs: Sequence[str]) -> None:
        """The version exists: the next delta starts from it.

        Args:
            proofs: of every worker.
        """
        for worker, index, part in self._route.parts_of(self._rank):
            if (data := self._encoded.get((worker.rank, index))) is not None:
                apply_changes(part, data, self._held[worker.rank, index])
        self._encoded, self.base = {}, (version, list(proofs))

    def abort(self) -> None:
        """Forgets what was encoded last; what is held stays."""
        self._encoded = {}


PartId = tuple[int, int]  # worker, bucket: one trainer rank has one part of it


Pack = Callable[[WorkerRoute, Part, Tensor], None]
