"""What one trainer rank packs in one sync, and the digests of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mbridge_rl.core.digest import add, combine, signed, unsigned
from mbridge_rl.sync import packing
from mbridge_rl.sync.delta import proof_of
from mbridge_rl.sync.group import RankGroup
from mbridge_rl.sync.packing import Digests
from mbridge_rl.sync.route import Part, Piece, Route, WorkerRoute


class Packer:
    """Packs parts from live tensors.

    Args:
        live: this rank's tensors, by the names of the route's sources.
        dtypes: of every HF tensor as it travels.
        with_digests: note them, of every part once, however often it is packed.
        looks: whether to note the names of tensors that hold NaN or infinity.

    Attributes:
        strange: those names.
    """

    def __init__(
        self,
        route: Route,
        live: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
        *,
        with_digests: bool,
        looks: bool,
    ) -> None:
        self._route, self._live, self._dtypes, self._with_digests = route, live, dtypes, with_digests
        self._of_workers: list[Digests] = [{} for _ in route.workers]
        self._counted: Digests = {}
        self._noted: set[tuple[int, int]] = set()
        self.strange: set[str] = set()
        self._looks = looks

    def pack(self, worker: WorkerRoute, part: Part, into: Tensor) -> None:
        """Writes `part` to `into` (uint8 `[part.nbytes]`); the digests are the last part of a worker."""
        if not part.pieces:
            packing.write_digests(worker, self._of_workers[worker.rank], into)
            return
        new = (worker.rank, part.start) not in self._noted
        self._noted.add((worker.rank, part.start))
        digests = self._of_workers[worker.rank] if new and self._with_digests else None
        for piece, share in packing.pack(part, into, self._read, digests, self.strange if new and self._looks else None):
            if piece.counted:
                self._counted[piece.hf_name] = add(self._counted.get(piece.hf_name, 0), share)

    def proven(self, version: int, group: RankGroup) -> tuple[str, list[str]]:
        """The digest of all weights, and every worker's proof (`delta.proof_of`). All ranks together."""
        all_names = list(self._dtypes)
        tables = [(all_names, self._counted)]
        tables += [(list(worker.hf_names), self._of_workers[worker.rank]) for worker in self._route.workers]
        shares = [signed(digests.get(hf_name, 0)) for names, digests in tables for hf_name in names]
        sums = iter(group.sum(torch.tensor(shares, dtype=torch.int64)).tolist())
        whole, *of_workers = [{hf_name: unsigned(next(sums)) for hf_name in names} for names, _ in tables]
        return combine(whole), [proof_of(version, digests) for digests in of_workers]

    def _read(self, piece: Piece) -> Tensor:
        return packing.placed(piece.source, piece.shape, self._live).to(self._dtypes[piece.hf_name])
