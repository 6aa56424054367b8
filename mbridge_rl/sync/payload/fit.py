"""Checks whether the pieces of a route fit the parameters that they are written to."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from mbridge_rl.core.errors import EngineMismatch
from mbridge_rl.sync.payload.engine_side import UNSPLIT_TENSOR
from mbridge_rl.sync.payload.route import Piece, WorkerRoute


def goes_unsplit(piece: Piece) -> bool:
    """Whether the piece belongs to a tensor that only the engine's own loader can place; the loader gets the full tensor."""
    return piece.target.name.startswith(UNSPLIT_TENSOR)


def require_place(piece: Piece, parameters: Mapping[str, Tensor]) -> None:
    """Checks that a piece fits its parameter.

    Raises:
        EngineMismatch: the worker lacks the parameter, or it has another dtype or is too small.
    """
    if goes_unsplit(piece):
        return
    name, parameter = piece.target.name, parameters.get(piece.target.name)
    if parameter is None:
        raise EngineMismatch(f"{piece.hf_name}: the plan writes to {name}, which this worker has not")
    if parameter.dtype != piece.dtype:
        raise EngineMismatch(f"{piece.hf_name}: the plan brings {piece.dtype}, {name} is {parameter.dtype}")
    last = piece.target.offset + sum((size - 1) * step for size, step in zip(piece.shape, piece.target.strides, strict=True))
    extent = sum((size - 1) * step for size, step in zip(parameter.shape, parameter.stride(), strict=True))
    if last > extent:
        raise EngineMismatch(f"{piece.hf_name}: the plan writes past the end of {name} {list(parameter.shape)}")


def each_written_once(route: WorkerRoute, parameters: Mapping[str, Tensor]) -> bool:
    """Whether no piece overwrites what another one wrote, so that each may be proven as soon as it is written."""
    by_storage: dict[int, list[Piece]] = {}
    for piece in route.pieces:
        if goes_unsplit(piece):
            return False
        by_storage.setdefault(parameters[piece.target.name].untyped_storage().data_ptr(), []).append(piece)
    return all(_disjoint(pieces, parameters) for pieces in by_storage.values())


def _disjoint(pieces: list[Piece], parameters: Mapping[str, Tensor]) -> bool:
    """Whether the pieces, which go to one storage, do not overlap. Pieces of different element sizes count as overlapping."""
    sizes = {piece.dtype.itemsize for piece in pieces}
    storage = parameters[pieces[0].target.name].untyped_storage()
    if len(sizes) > 1:
        return False
    written = torch.zeros(storage.nbytes() // sizes.pop(), dtype=torch.bool)
    for piece in pieces:
        first = parameters[piece.target.name].storage_offset() + piece.target.offset
        written.as_strided(piece.shape, piece.target.strides, first).fill_(True)
    return int(written.sum()) == sum(prod(piece.shape) for piece in pieces)
