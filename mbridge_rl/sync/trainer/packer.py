"""What one trainer rank sends in one sync: examined where it is, then packed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mbridge_rl.core.digest import add, combine, signed, unsigned
from mbridge_rl.core.plan import View
from mbridge_rl.core.segments import Shape
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.sync.payload import packing
from mbridge_rl.sync.payload.packing import Digests, proof_of
from mbridge_rl.sync.payload.route import Part, Piece, Route, WorkerRoute


class Packer:
    """Reads live tensors twice: `examine` takes their digests and finds NaN and infinity, before anything is sent; `pack` moves
    them. What arrives is compared with the digests of where it came from, so the moving is proven as well.

    Args:
        rank: of the trainer.
        live: its tensors, by the names of the route's sources.
        dtypes: of every HF tensor as it travels.
    """

    def __init__(self, route: Route, rank: int, live: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        self._route, self._rank, self._live, self._dtypes = route, rank, live, dtypes
        self._of_workers: list[Digests] = [{} for _ in route.workers]
        self._counted: Digests = {}

    def examine(self, *, with_digests: bool, looks: bool) -> set[str]:
        """All that this rank sends, once, however many workers get it.

        Args:
            looks: for NaN and infinity.

        Returns:
            The names of the tensors that hold some.
        """
        strange: set[str] = set()
        shares: dict[tuple[View, View, Shape, torch.dtype], int] = {}
        for worker, _, part in self._route.parts_of(self._rank) if with_digests or looks else ():
            of_worker = self._of_workers[worker.rank]
            for piece in part.pieces:
                rectangle = piece.source, piece.hf, piece.shape, piece.dtype
                if rectangle not in shares:
                    look = strange if looks else None
                    shares[rectangle] = packing.examine(piece, self._read(piece), with_digest=with_digests, strange=look)
                of_worker[piece.hf_name] = add(of_worker.get(piece.hf_name, 0), shares[rectangle])
                if piece.counted:
                    self._counted[piece.hf_name] = add(self._counted.get(piece.hf_name, 0), shares[rectangle])
        return strange

    def pack(self, worker: WorkerRoute, part: Part, into: Tensor) -> None:
        """Writes `part` to `into` (uint8 `[part.nbytes]`); the digests are the last part of a worker."""
        if part.pieces:
            packing.pack(part, into, self._read)
        else:
            packing.write_digests(worker, self._of_workers[worker.rank], into)

    def proven(self, version: int, group: RankGroup) -> tuple[str, list[str]]:
        """The digest of all weights, and every worker's proof (`packing.proof_of`). All ranks together."""
        all_names = list(self._dtypes)
        tables = [(all_names, self._counted)]
        tables += [(list(worker.hf_names), self._of_workers[worker.rank]) for worker in self._route.workers]
        shares = [signed(digests.get(hf_name, 0)) for names, digests in tables for hf_name in names]
        sums = iter(group.sum(torch.tensor(shares, dtype=torch.int64)).tolist())
        whole, *of_workers = [{hf_name: unsigned(next(sums)) for hf_name in names} for names, _ in tables]
        return combine(whole), [proof_of(version, digests) for digests in of_workers]

    def _read(self, piece: Piece) -> Tensor:
        values = packing.placed(piece.source, piece.shape, self._live)
        return values.to(self._dtypes[piece.hf_name]).to(piece.dtype)
