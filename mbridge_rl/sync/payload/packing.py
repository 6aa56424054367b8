"""Bytes of an image: packed from a trainer's tensors, written into an engine's parameters, and proven on both ends."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from mbridge_rl.core.digest import add, digest_and_look, digest_strided, signed, unsigned
from mbridge_rl.core.errors import DigestMismatch, listed
from mbridge_rl.core.finite import is_finite
from mbridge_rl.core.plan import View
from mbridge_rl.core.segments import Shape
from mbridge_rl.sync.payload.route import Part, Piece, WorkerRoute

Digests = dict[str, int]


def proof_of(version: int, digests: Digests) -> str:
    """Names the weights that one worker keeps: `version`, and the digests of all of them by HF name."""
    return hashlib.blake2b(json.dumps([version, sorted(digests.items())]).encode(), digest_size=16).hexdigest()


_BLOCK_BYTES = 1 << 19  # what is moved is digested while it is in a core's cache still


def pack(part: Part, into: Tensor, read: Callable[[Piece], Tensor]) -> None:
    """Writes the pieces of `part` to `into` (uint8 `[part.nbytes]`)."""
    for piece in part.pieces:
        rectangle(piece, into, part.start).copy_(read(piece))


def examine(piece: Piece, values: Tensor, *, with_digest: bool, strange: set[str] | None = None) -> int:
    """Reads `values`, `[*piece.shape]` and wherever they lie, once.

    Args:
        strange: gets the name of the source if a value is NaN or infinite.

    Returns:
        Their digest as part of the HF tensor; 0 if none is wanted.
    """
    share, finite = 0, True
    if with_digest and strange is not None:
        share, finite = digest_and_look(values, columns=piece.columns, offset=piece.hf.offset, strides=piece.hf.strides)
    elif with_digest:
        share = _share(piece, values, piece.hf.offset)
    elif strange is not None:
        finite = is_finite(values)
    if strange is not None and not finite:
        strange.add(piece.source.name)
    return share


def move(piece: Piece, values: Tensor, into: Tensor, with_digest: bool) -> int:
    """Copies `values` to `into`, both `[*piece.shape]` and wherever they lie, block by block.

    Returns:
        The digest of what `into` holds then; 0 if none is wanted.
    """
    share = 0
    for block, incoming, hf_offset in _blocks(piece, into, values):
        block.copy_(incoming)
        if with_digest:
            share += _share(piece, block, hf_offset)
    return unsigned(share)


def _blocks(piece: Piece, into: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Both a cache's size at a time, with the place of the first element in the HF tensor."""
    dim = next((dim for dim, size in enumerate(piece.shape) if size > 1), None)
    if dim is None or piece.nbytes <= _BLOCK_BYTES or into.device.type != "cpu":
        yield into, values, piece.hf.offset
        return
    step = max(1, piece.shape[dim] * _BLOCK_BYTES // piece.nbytes)
    for index, (block, incoming) in enumerate(zip(into.split(step, dim), values.split(step, dim), strict=True)):
        yield block, incoming, piece.hf.offset + index * step * piece.hf.strides[dim]


def _share(piece: Piece, block: Tensor, hf_offset: int) -> int:
    return digest_strided(block, columns=piece.columns, offset=hf_offset, strides=piece.hf.strides)


def rectangle(piece: Piece, data: Tensor, start: int = 0) -> Tensor:
    """`piece` as it lies in `data` (uint8), whose first byte is byte `start` of the image; `[*piece.shape]`."""
    first = piece.offset - start
    return data[first : first + piece.nbytes].view(piece.dtype).view(piece.shape)


def placed(view: View, shape: Shape, tensors: Mapping[str, Tensor]) -> Tensor:
    return view.of(tensors[view.name], shape)


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
    """Raises DigestMismatch, with the tensors, where an image is not what the trainer ranks say that they hold."""
    expected, found = expected_digests(worker, image), image_digests(worker, image)
    if wrong := [hf_name for hf_name, value in expected.items() if found.get(hf_name, 0) != value]:
        raise DigestMismatch(f"{len(wrong)} tensors arrived with other bytes for worker {worker.rank}: {listed(wrong)}")


def require_proof(worker: WorkerRoute, image: Tensor, version: int, proof: str) -> None:
    """Raises DigestMismatch where the digests in an image are not those of which the trainer gave the `proof`; reads nothing
    else of it."""
    if (own := proof_of(version, expected_digests(worker, image))) != proof:
        raise DigestMismatch(
            f"the image of worker {worker.rank} has the digests of other weights than version {version}: proof {own}, expected "
            f"{proof}"
        )


def live_digests(pieces: Iterable[Piece], parameters: Mapping[str, Tensor]) -> Digests:
    """Digests of what the parameters hold."""
    return _digests_of(pieces, lambda piece: placed(piece.target, piece.shape, parameters))


def _digests_of(pieces: Iterable[Piece], values: Callable[[Piece], Tensor]) -> Digests:
    found: Digests = {}
    for piece in pieces:
        found[piece.hf_name] = add(found.get(piece.hf_name, 0), examine(piece, values(piece), with_digest=True))
    return found
