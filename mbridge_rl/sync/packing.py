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
from mbridge_rl.sync.finite import is_finite
from mbridge_rl.sync.route import Part, Piece, WorkerRoute

Digests = dict[str, int]
_BLOCK_BYTES = 1 << 20  # what is moved is digested while it is in a core's cache still


def pack(
    part: Part, into: Tensor, read: Callable[[Piece], Tensor], digests: Digests | None, strange: set[str] | None = None
) -> list[tuple[Piece, int]]:
    """Writes the pieces of `part` to `into` (uint8 `[part.nbytes]`); if `digests` are wanted adds each piece's, by HF name, to
    them, and returns the pieces with theirs; adds to `strange` the names of sources that hold NaN or infinity."""
    found = []
    for piece in part.pieces:
        share = move(piece, read(piece), rectangle(piece, into, part.start), digests is not None, strange)
        if digests is not None:
            digests[piece.hf_name] = add(digests.get(piece.hf_name, 0), share)
            found.append((piece, share))
    return found


def move(piece: Piece, values: Tensor, into: Tensor, with_digest: bool, strange: set[str] | None = None) -> int:
    """Copies `values` to `into`, both `[*piece.shape]` and wherever they lie, block by block.

    Args:
        strange: gets the name of the source if a value is NaN or infinite.

    Returns:
        The digest of what `into` holds then; 0 if none is wanted.
    """
    dim = next((dim for dim, size in enumerate(piece.shape) if size > 1), 0)
    size = piece.shape[dim] if piece.shape else 1
    step = max(1, size * _BLOCK_BYTES // piece.nbytes) if into.device.type == "cpu" else size
    share = 0
    for first in range(0, size, step):
        block = into if step >= size else into.narrow(dim, first, min(step, size - first))
        block.copy_(values if step >= size else values.narrow(dim, first, block.shape[dim]))
        if strange is not None and not is_finite(block):
            strange.add(piece.source.name)
        if with_digest:
            offset = piece.hf.offset + first * piece.hf.strides[dim] if piece.shape else piece.hf.offset
            share += digest_strided(block, columns=piece.columns, offset=offset, strides=piece.hf.strides)
    return unsigned(share)


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
