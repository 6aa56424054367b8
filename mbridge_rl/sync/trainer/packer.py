"""Examines and packs what one trainer rank sends in one sync."""

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
    """Reads live tensors twice: `examine` computes their digests and finds NaN and infinity before anything is sent; `pack`
    copies them. The bytes that arrive are compared with the digests of the live tensors, so the copying is proven as well.

    Args:
        route: what every engine worker receives.
        rank: the trainer rank that sends.
        live: the live tensors of this rank, by the names of the route's sources.
        dtypes: the dtype in which each HF tensor travels, by `hf_name`.
    """

    def __init__(self, route: Route, rank: int, live: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        self._route, self._rank, self._live, self._dtypes = route, rank, live, dtypes
        self._worker_digests: list[Digests] = [{} for _ in route.workers]
        self._counted: Digests = {}

    def examine(self, *, with_digests: bool, check_finite: bool) -> set[str]:
        """Reads everything that this rank sends once, however many workers receive it.

        Args:
            with_digests: compute the digests that `pack` and `proven` need.
            check_finite: look for NaN and infinity.

        Returns:
            The names of the live tensors that hold NaN or infinity.
        """
        nonfinite_names: set[str] = set()
        shares: dict[tuple[View, View, Shape, torch.dtype], int] = {}
        for worker, _, part in self._route.parts_of(self._rank) if with_digests or check_finite else ():
            digests = self._worker_digests[worker.rank]
            for piece in part.pieces:
                rectangle = piece.source, piece.hf, piece.shape, piece.dtype
                if rectangle not in shares:
                    shares[rectangle] = packing.examine(
                        piece,
                        self._read(piece),
                        with_digest=with_digests,
                        nonfinite_names=nonfinite_names if check_finite else None,
                    )
                digests[piece.hf_name] = add(digests.get(piece.hf_name, 0), shares[rectangle])
                if piece.counted:
                    self._counted[piece.hf_name] = add(self._counted.get(piece.hf_name, 0), shares[rectangle])
        return nonfinite_names

    def pack(self, worker: WorkerRoute, part: Part, into: Tensor) -> None:
        """Writes `part` to `into` (uint8 `[part.nbytes]`). A part without pieces is this rank's digests for the worker."""
        if part.pieces:
            packing.pack(part, into, self._read)
        else:
            packing.write_digests(worker, self._worker_digests[worker.rank], into)

    def proven(self, version: int, group: RankGroup) -> tuple[str, list[str]]:
        """The digest of all weights, and the proof of every worker's weights (`packing.proof_of`). All ranks call it
        together."""
        all_names = list(self._dtypes)
        tables = [(all_names, self._counted)]
        tables += [(list(worker.hf_names), self._worker_digests[worker.rank]) for worker in self._route.workers]
        shares = [signed(digests.get(hf_name, 0)) for names, digests in tables for hf_name in names]
        sums = iter(group.sum(torch.tensor(shares, dtype=torch.int64)).tolist())
        model_digests, *worker_digests = [{hf_name: unsigned(next(sums)) for hf_name in names} for names, _ in tables]
        return combine(model_digests), [proof_of(version, digests) for digests in worker_digests]

    def _read(self, piece: Piece) -> Tensor:
        values = packing.placed(piece.source, piece.shape, self._live)
        return values.to(self._dtypes[piece.hf_name]).to(piece.dtype)
