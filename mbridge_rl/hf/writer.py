"""Writes a Hugging Face checkpoint without gathering it: headers are computed from the plan, and every rank writes the
rectangles that it holds. Files are made in a staging directory, which takes the checkpoint's place when all files are verified.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mbridge_rl.core.digest import digest_strided, signed, unsigned
from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.plan import View
from mbridge_rl.core.segments import Shape
from mbridge_rl.hf.checkpoint import INDEX_FILE, SINGLE_FILE
from mbridge_rl.hf.header import DTYPES
from mbridge_rl.hf.proof import require_written
from mbridge_rl.hf.publish import Replacement
from mbridge_rl.hf.rectangles import Rectangle, write_from

DEFAULT_SHARD_BYTES = 5 << 30
_CAST_BYTES = 64 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ShardFile:
    """The plan of one safetensors file: its header, and the offset of each tensor in bytes."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    tensors: Mapping[str, HFTensor]
    nbytes: int


def plan_files(tensors: Sequence[HFTensor], shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[ShardFile]:
    """Distributes tensors, in order, over files of at most `shard_bytes` (a larger tensor gets its own file)."""
    groups: list[list[HFTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if len(groups) == 1:
        return [shard_file(SINGLE_FILE, groups[0])]
    count = len(groups)
    return [shard_file(f"model-{i:05}-of-{count:05}.safetensors", group) for i, group in enumerate(groups, 1)]


def shard_file(name: str, tensors: Sequence[HFTensor]) -> ShardFile:
    """The plan of one file with all `tensors`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    # Larger elements first, as safetensors' own writer does, so that every tensor is aligned where dtypes are mixed.
    for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
        offsets[tensor.hf_name], begin = end, end
        end += tensor.nbytes
        header[tensor.hf_name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns data to 8 bytes by padding the header
    start = 8 + len(text)
    offsets = {hf_name: start + offset for hf_name, offset in offsets.items()}
    tensors_by_name = {tensor.hf_name: tensor for tensor in tensors}
    return ShardFile(name, len(text).to_bytes(8, "little") + text, offsets, tensors_by_name, start + end)


@dataclass(frozen=True)
class Created:
    """Attributes:
    attempt: the attempt's number, with which the other ranks join.
    mapped: whether files may be mapped. This requires that the file system can reserve their space, since a mapped write to a
        full disk kills the process.
    """

    attempt: int
    mapped: bool


class StagingDirectory:
    """A checkpoint under construction beside `directory`, on a file system that all ranks share.

    One rank creates it; all ranks join, write, finish and prove; and the first one publishes or discards it. The old content of
    `directory` stays until the staged files are read back and compared with what the ranks wrote.

    Args:
        durable: whether `finish` and `publish` wait for the disk, so that even a power failure leaves no damaged checkpoint
            that looks complete.
        only_new: refuse to replace a directory that is not empty.
    """

    def __init__(
        self, directory: str | Path, files: Sequence[ShardFile], *, durable: bool = True, only_new: bool = False
    ) -> None:
        self._replacement = Replacement(directory, only_new=only_new)
        self.directory = self._replacement.directory
        self._files, self._durable = files, durable
        self._file_of = {hf_name: file for file in files for hf_name in file.offsets}
        self._digests = dict.fromkeys(self._file_of, 0)
        self._descriptors: dict[str, int] = {}
        self._memory: dict[str, Tensor] = {}

    @property
    def path(self) -> Path:
        """The directory into which this attempt is written."""
        return self._replacement.path

    def create(self, *, mapped: bool) -> Created:
        """Waits until no other process saves there, and makes the files with their headers at their full size.

        Args:
            mapped: whether files may be mapped, because all ranks are on one machine. On a network file system machines that
                map the same page would overwrite each other's part of it.

        Raises:
            CheckpointError: another process is saving there, the disk is full, or the place cannot be written.
        """
        with self._as_checkpoint_error("prepared"):
            attempt = self._replacement.begin()
            for file in self._files:
                with (self.path / file.name).open("wb") as opened:
                    opened.write(file.header)
                    opened.truncate(file.nbytes)
                    mapped = mapped and _reserve(opened.fileno(), file.nbytes)
        return Created(attempt, mapped)

    def join(self, attempt: int) -> None:
        """Joins the attempt of this number, which another rank created."""
        self._replacement.join(attempt)

    def write(self, view: View, shape: Shape, source: Tensor, *, mapped: bool) -> None:
        """Writes `source`, `[*shape]` of any dtype, as a rectangle of the HF tensor `view.name`.

        Raises:
            CheckpointError: the file cannot be written.
        """
        file = self._file_of[view.name]
        tensor = file.tensors[view.name]
        with self._as_checkpoint_error("written"):
            for part, values in _cast(view, shape, source, tensor.dtype):
                self._write(file, part, values, mapped=mapped)
                self._digests[view.name] += digest_strided(
                    values, columns=tensor.columns, offset=part.offset, strides=part.strides
                )

    def finish(self) -> Tensor:
        """Ends this rank's writes and flushes them to the disk.

        Returns:
            The digest of this rank's writes to each tensor, int64 `[tensors]`, to be summed over ranks.

        Raises:
            CheckpointError: the bytes cannot be written to the disk.
        """
        self._memory.clear()
        with self._as_checkpoint_error("written"), contextlib.ExitStack() as closing:
            for descriptor in self._descriptors.values():
                closing.callback(os.close, descriptor)
            if self._durable:
                for descriptor in self._descriptors.values():
                    os.fdatasync(descriptor)
            self._descriptors.clear()
        return torch.tensor([signed(unsigned(value)) for value in self._digests.values()], dtype=torch.int64)

    def prove(self, written: Tensor, *, rank: int = 0, size: int = 1) -> None:
        """Reads this rank's share of the staged files back and compares it with the writes of all ranks.

        Args:
            written: the digests that `finish` returned, summed over ranks.

        Raises:
            CheckpointError: the files hold other bytes; the message names the tensor. Nothing was replaced.
        """
        with self._as_checkpoint_error("read back"):
            require_written(self.path, self._files, [unsigned(value) for value in written.tolist()], rank=rank, size=size)

    def publish(self) -> None:
        """Writes the index and puts the checkpoint in its place; call it after `prove` on all ranks.

        Raises:
            CheckpointError: the checkpoint cannot be put there.
        """
        with self._as_checkpoint_error("published"):
            self._write_index()
            self._replacement.publish(durable=self._durable)
        self._replacement.end()

    def discard(self) -> None:
        """Removes the staging directory, and lets other processes save there. After `publish` it does nothing."""
        self._replacement.end()

    @contextlib.contextmanager
    def _as_checkpoint_error(self, action: str) -> Iterator[None]:
        """Turns an OSError inside of the block into a CheckpointError; `action` is a participle, such as "written"."""
        try:
            yield
        except OSError as error:
            needed = sum(file.nbytes for file in self._files)
            hint = f"; it needs {needed} bytes" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
            raise CheckpointError(f"{self.directory} was not saved, as it could not be {action}: {error}{hint}") from error

    def _write(self, file: ShardFile, view: View, values: Tensor, *, mapped: bool) -> None:
        start, shape = file.offsets[view.name], tuple(values.shape)
        if mapped:
            tensor = file.tensors[view.name]
            target = self._mapped(file)[start : start + tensor.nbytes].view(tensor.dtype)
            view.of(target, shape).copy_(values)
        else:
            rectangle = Rectangle(values.dtype, start + view.offset * values.dtype.itemsize, shape, view.strides)
            write_from(self._descriptor(file), rectangle, values)

    def _descriptor(self, file: ShardFile) -> int:
        if file.name not in self._descriptors:
            self._descriptors[file.name] = os.open(self.path / file.name, os.O_RDWR | os.O_CLOEXEC)
        return self._descriptors[file.name]

    def _mapped(self, file: ShardFile) -> Tensor:
        """The bytes of a file, uint8 `[nbytes]`."""
        if file.name not in self._memory:
            self._descriptor(file)  # `finish` flushes the file by its descriptor
            storage = torch.UntypedStorage.from_file(str(self.path / file.name), shared=True, nbytes=file.nbytes)
            self._memory[file.name] = torch.empty(0, dtype=torch.uint8).set_(storage)
        return self._memory[file.name]

    def _write_index(self) -> None:
        if len(self._files) == 1:
            return
        weight_map = {hf_name: file.name for file in self._files for hf_name in file.offsets}
        total = sum(tensor.nbytes for file in self._files for tensor in file.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.path / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _cast(view: View, shape: Shape, source: Tensor, dtype: torch.dtype) -> Iterator[tuple[View, Tensor]]:
    """Yields `source` in the file's dtype, in parts of bounded size if a copy is needed. The digest is computed of the cast
    values, since two casts of one NaN need not give the same bits."""
    if source.dtype == dtype:
        yield view, source
        return
    nbytes = source.numel() * dtype.itemsize
    rows = shape[0] if shape else 1
    step = max(1, rows * _CAST_BYTES // max(1, nbytes))
    if step >= rows:
        yield view, source.to(dtype)
        return
    for first in range(0, rows, step):
        yield replace(view, offset=view.offset + first * view.strides[0]), source[first : first + step].to(dtype)


def _reserve(descriptor: int, nbytes: int) -> bool:
    """Reserves the space of a full file; returns whether the file system can do this. Raises OSError if the disk is full."""
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(nbytes)):
        if ctypes.get_errno() in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return True
