"""The bytes of an image are packed from a trainer's tensors, written into an engine's parameters, and proven on both ends."""

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
    """A hash that identifies the weights of one worker: of `version` and of the digests of all its weights by HF name."""
    return hashlib.blake2b(json.dumps([version, sorted(digests.items())]).encode(), digest_size=16).hexdigest()


_BLOCK_BYTES = 1 << 19  # a block is digested while it is still in the cache of a core


def pack(part: Part, into: Tensor, read: Callable[[Piece], Tensor]) -> None:
    """Writes the pieces of `part` to `into` (uint8 `[part.nbytes]`)."""
    for piece in part.pieces:
        rectangle(piece, into, part.start).copy_(read(piece))


def examine(piece: Piece, values: Tensor, *, with_digest: bool, nonfinite_names: set[str] | None = None) -> int:
    """Reads `values` once.

    Args:
        values: `[*piece.shape]`, of any strides.
        with_digest: compute their digest.
        nonfinite_names: gets the name of the source if a value is NaN or infinite; `None` skips the check.

    Returns:
        The digest of the values as part of the HF tensor; 0 without `with_digest`.
    """
    share, finite = 0, True
    if with_digest and nonfinite_names is not None:
        share, finite = digest_and_look(values, columns=piece.columns, offset=piece.hf.offset, strides=piece.hf.strides)
    elif with_digest:
        share = _share(piece, values, piece.hf.offset)
    elif nonfinite_names is not None:
        finite = is_finite(values)
    if nonfinite_names is not None and not finite:
        nonfinite_names.add(piece.source.name)
    return share


def move(piece: Piece, values: Tensor, into: Tensor, with_digest: bool) -> int:
    """Copies `values` to `into`, both `[*piece.shape]` of any strides, block by block.

    Returns:
        The digest of what `into` holds afterwards; 0 without `with_digest`.
    """
    share = 0
    for block, incoming, hf_offset in _blocks(piece, into, values):
        block.copy_(incoming)
        if with_digest:
            share += _share(piece, block, hf_offset)
    return unsigned(share)


def _blocks(piece: Piece, into: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Cuts both tensors into blocks of the size of a cache.

    Yields:
        `(block of into, block of values, offset of the block's first element in the HF tensor)`.
    """
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
    """The values of `piece`, `[*piece.shape]`, as a view of `data` (uint8), whose first byte is byte `start` of the image."""
    first = piece.offset - start
    return data[first : first + piece.nbytes].view(piece.dtype).view(piece.shape)


def placed(view: View, shape: Shape, tensors: Mapping[str, Tensor]) -> Tensor:
    """The rectangle `[*shape]` of the tensor that `view` names."""
    return view.of(tensors[view.name], shape)


def write_digests(worker: WorkerRoute, digests: Digests, into: Tensor) -> None:
    """Writes one trainer rank's digests to `into`, its digest part (uint8), as int64 `[len(worker.hf_names)]`."""
    numbers = torch.tensor([signed(digests.get(hf_name, 0)) for hf_name in worker.hf_names], dtype=torch.int64)
    into[: numbers.nbytes].view(torch.int64).copy_(numbers)


def read_digests(worker: WorkerRoute, tables: Iterable[Tensor]) -> Digests:
    """The sums of all trainer ranks' digests of the worker's weights, by HF name, from their digest parts `tables`."""
    total = torch.zeros(len(worker.hf_names), dtype=torch.int64)
    for table in tables:
        total += table[: total.nbytes].view(torch.int64)
    return {hf_name: unsigned(value) for hf_name, value in zip(worker.hf_names, total.tolist(), strict=True)}


def image_digests(worker: WorkerRoute, image: Tensor) -> Digests:
    """The digests of the weights in an image, computed from its bytes."""
    return _digests_of(worker.pieces, lambda piece: rectangle(piece, image))


def expected_digests(worker: WorkerRoute, image: Tensor) -> Digests:
    """The trainer's digests, as the image brings them."""
    return read_digests(worker, (image[part.start : part.start + part.nbytes] for part in worker.digest_parts))


def require_expected(worker: WorkerRoute, image: Tensor) -> None:
    """Compares the weights in an image with the trainer's digests.

    Raises:
        DigestMismatch: they differ; names the tensors.
    """
    expected, actual = expected_digests(worker, image), image_digests(worker, image)
    if wrong_names := [hf_name for hf_name, value in expected.items() if actual.get(hf_name, 0) != value]:
        raise DigestMismatch(
            f"{len(wrong_names)} tensors arrived with other bytes for worker {worker.rank}: {listed(wrong_names)}"
        )


def require_proof(worker: WorkerRoute, image: Tensor, version: int, proof: str) -> None:
    """Compares the digests in an image with the trainer's `proof`; reads nothing else of the image.

    Raises:
        DigestMismatch: the image has the digests of other weights.
    """
    if (own := proof_of(version, expected_digests(worker, image))) != proof:
        raise DigestMismatch(
            f"the image of worker {worker.rank} has the digests of other weights than version {version}: proof {own}, expected "
            f"{proof}"
        )


def live_digests(pieces: Iterable[Piece], parameters: Mapping[str, Tensor]) -> Digests:
    """The digests of what the parameters hold, by HF name."""
    return _digests_of(pieces, lambda piece: placed(piece.target, piece.shape, parameters))


def _digests_of(pieces: Iterable[Piece], values: Callable[[Piece], Tensor]) -> Digests:
    digests: Digests = {}
    for piece in pieces:
        digests[piece.hf_name] = add(digests.get(piece.hf_name, 0), examine(piece, values(piece), with_digest=True))
    return digests
