"""Reads staged files back: a checkpoint replaces another only if its files hold the written bytes.

Before a rectangle of a tensor is written, its digest is computed (`core.digest`). The digests of a tensor's rectangles add up
to that of the tensor, which is compared with the digest of the bytes in the file. This detects lost, torn and repeated writes,
and files that another process made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mbridge_rl.core.digest import add, digest_strided
from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.model import HFTensor
from mbridge_rl.hf.rectangles import Rectangle, read_into

_BLOCK_BYTES = 16 << 20
READ_BACK_ADVICE = (
    "does something else write or clean up there, or does the file system lose data? Nothing was replaced; save again"
)


class PlannedFile(Protocol):
    """The plan of a safetensors file (`hf.writer.ShardFile`)."""

    @property
    def name(self) -> str: ...
    @property
    def header(self) -> bytes: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def offsets(self) -> Mapping[str, int]: ...
    @property
    def tensors(self) -> Mapping[str, HFTensor]: ...


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; they may be on different devices."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    flat = (tensor.detach().contiguous().view(-1).view(torch.uint8).cpu() for tensor in (left, right))
    return torch.equal(*flat)


def require_written(directory: Path, files: Sequence[PlannedFile], digests: Sequence[int], *, rank: int, size: int) -> None:
    """Compares one rank's share of the files with the written tensors; together the ranks read every byte once.

    Args:
        digests: digests of the written tensors, in the order of the files and of their offsets.

    Raises:
        CheckpointError: a file is missing, too short, or holds other bytes; the message names the tensor.
        OSError: a file cannot be read.
    """
    total = sum(file.nbytes for file in files)
    before, expected = 0, iter(digests)
    for file in files:
        own_tensors = [
            (hf_name, start, digest)
            for (hf_name, start), digest in zip(file.offsets.items(), expected, strict=False)
            if (before + start) * size // total == rank
        ]
        with_header = before * size // total == rank
        before += file.nbytes
        if not own_tensors and not with_header:
            continue
        try:
            descriptor = os.open(directory / file.name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise CheckpointError(f"{directory / file.name} is gone, though this save made it: {READ_BACK_ADVICE}") from error
        try:
            if with_header:
                _require_header(descriptor, directory, file)
            for hf_name, start, digest in own_tensors:
                _require_tensor(descriptor, directory / file.name, file.tensors[hf_name], start, digest)
        finally:
            os.close(descriptor)


def _require_header(descriptor: int, directory: Path, file: PlannedFile) -> None:
    nbytes = os.fstat(descriptor).st_size
    if nbytes != file.nbytes or os.pread(descriptor, len(file.header), 0) != file.header:
        raise CheckpointError(
            f"{directory / file.name} has {nbytes} bytes, {file.nbytes} were written, or its header is another: "
            f"{READ_BACK_ADVICE}"
        )


def _require_tensor(descriptor: int, path: Path, tensor: HFTensor, start: int, expected: int) -> None:
    try:
        digest = add(*(_digest(descriptor, tensor, start, first, count) for first, count in _blocks(tensor)))
    except EOFError as error:
        raise CheckpointError(f"{path}: {error} within {tensor.hf_name}: {READ_BACK_ADVICE}") from error
    if digest != expected:
        raise CheckpointError(
            f"{path}: {tensor.hf_name} has digest {digest:016x} when it is read back, {expected:016x} was written: "
            f"{READ_BACK_ADVICE}"
        )


def _blocks(tensor: HFTensor) -> Iterator[tuple[int, int]]:
    """Yields the first row and the number of rows of blocks of bounded size that make up a tensor."""
    columns = max(1, tensor.columns)
    rows = prod(tensor.shape) // columns
    step = max(1, _BLOCK_BYTES // (columns * tensor.dtype.itemsize))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def _digest(descriptor: int, tensor: HFTensor, start: int, first: int, count: int) -> int:
    columns = tensor.columns
    block = torch.empty((count, columns), dtype=tensor.dtype)
    offset = first * columns
    read_into(
        descriptor, Rectangle(tensor.dtype, start + offset * tensor.dtype.itemsize, (count, columns), (columns, 1)), block
    )
    return digest_strided(block, columns=columns, offset=offset, strides=(columns, 1))
