"""Bytes of an image: packed from a trainer's tensors, written into an engine's parameters, and proven on both ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from mbridge_rl.core.digest import add, digest_strided, signed, unsigned
from mbridge_rl.core.errors import listed
from mbridge_rl.core.plan import View
from mbridge_rl.core.segments import Shape
from mbridge_rl.sync.errors import DigestMismatch
from mbridge_rl.sync.route import Part, Piece, WorkerRoute

Digests = dict[str, int]


def pack(part: Part, into: Tensor, read: Callable[[Piece], Tensor], digests: Digests | None) -> list[tuple[Piece, int]]:
    """Writes the pieces of `part` to `into` (uint8 `[part.nbytes]`); if `digests` are wanted adds each piece's, by HF name, to
    them, and returns the pieces with theirs."""
    found = []
    for piece in part.pieces:
        values = rectangle(piece, into, part.start)
        values.copy_(read(piece))
        if digests is not None:
            share = piece_digest(piece, values)
            digests[piece.hf_name] = add(digests.get(piece.hf_name, 0), share)
            found.append((piece, share))
    return found


def rectangle(piece: Piece, data: Tensor, start: int = 0) -> Tensor:
    """`piece` as it lies in `data` (uint8), whose first byte is byte `start` of the image; `[*piece.shape]`."""
    first = piece.offset - start
    return data[first : first + piece.nbytes].view(piece.dtype).view(piece.shape)


def placed(view: View, shape: Shape, tensors: Mapping[str, Tensor]) -> Tensor:
    return view.of(tensors[view.name], shape)


def piece_digest(piece: Piece, values: Tensor) -> int:
    """Of the piece's values, wherever they lie, as part of the HF tensor."""
    return digest_strided(values, columns=piece.columns, offset=piece.hf.offset, strides=piece.hf.strides)


def write_digests(worker: WorkerRoute, digests: Digests, into: Tensor) -> None:
    """One trainer rank's digests as bytes of its digest part."""
    numbers = torch.tensor([signed(digests.get(hf_name, 0)) for hf_name in worker.hf_names], dtype=torch.int64)
    into[: numbers.nbytes].view(torch.int64).copy_(numbers)


def read_digests(worker: WorkerRoute, tables: Iterable[Tensor]) -> Digests:
    """The sum of all trainer ranks' digests of what the worker keeps, by HF name."""
    total = torch.zeros(len(worker.hf_names), dtype=torch.int64)
    for table in tables:
        total += table[: total.nbytes].view(torch.int64)
    return {hf_name: unsigned(value) for hf_name, value in zip(worker.hf_names, total.tolist(), strict=True)}


def image_digests(worker: WorkerRoute, image: Tensor) -> Digests:
    """Digests of the weights in an image, computed anew."""
    return _digests_of(worker.pieces, lambda piece: rectangle(piece, image))


def expected_digests(worker: WorkerRoute, image: Tensor) -> Digests:
    """The trainer's own, out of the image."""
    return read_digests(worker, (image[part.start : part.start + part.nbytes] for part in worker.digest_parts))


def require_expected(worker: WorkerRoute, image: Tensor) -> None:
    """Raises DigestMismatch, with the tensors, where an image is not what the trainer ranks say that they packed."""
    expected, found = expected_digests(worker, image), image_digests(worker, image)
    if wrong := [hf_name for hf_name, value in expected.items() if found.get(hf_name, 0) != value]:
        raise DigestMismatch(f"{len(wrong)} tensors arrived with other bytes for worker {worker.rank}: {listed(wrong)}")


def live_digests(pieces: Iterable[Piece], parameters: Mapping[str, Tensor]) -> Digests:
    """Digests of what the parameters hold."""
    return _digests_of(pieces, lambda piece: placed(piece.target, piece.shape, parameters))


def _digests_of(pieces: Iterable[Piece], values: Callable[[Piece], Tensor]) -> Digests:
    found: Digests = {}
    for piece in pieces:
        found[piece.hf_name] = add(found.get(piece.hf_name, 0), piece_digest(piece, values(piece)))
    return found
