"""Writing a Hugging Face checkpoint without gathering it: headers are computed from the plan, and every rank writes the
rectangles that it holds. Files are made in a staging directory, which takes the checkpoint's place when all of it is on disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.plan import View
from mbridge_rl.core.segments import Shape
from mbridge_rl.hf.checkpoint import INDEX_FILE, SINGLE_FILE
from mbridge_rl.hf.header import DTYPES
from mbridge_rl.hf.publish import replace_directory
from mbridge_rl.hf.rectangles import Rectangle, write_from

DEFAULT_SHARD_BYTES = 5 << 30
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file to be: its header, and where each tensor begins, in bytes."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    tensors: Mapping[str, HFTensor]
    nbytes: int


def plan_files(tensors: Sequence[HFTensor], shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[ShardFile]:
    """Deals tensors, in order, to files of at most `shard_bytes` (a larger tensor gets a file of its own)."""
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
    """One file of all `tensors`."""
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
    of_name = {tensor.hf_name: tensor for tensor in tensors}
    return ShardFile(name, len(text).to_bytes(8, "little") + text, offsets, of_name, start + end)


class StagingDirectory:
    """A checkpoint under construction beside `directory`, on a file system that all ranks share.

    One rank creates it, all write, and one publishes it. What an earlier, interrupted save left is removed at `create`; it
    never had the checkpoint's name.

    Args:
        durable: `finish` and `publish` wait for the disk, so that a power failure leaves no complete-looking ruin either.
    """

    def __init__(self, directory: str | Path, files: Sequence[ShardFile], *, durable: bool = True) -> None:
        self.directory = Path(directory).resolve()
        self.path = self.directory.parent / f".{self.directory.name}.incomplete"
        self._files, self._durable = files, durable
        self._file_of = {hf_name: file for file in files for hf_name in file.offsets}
        self._descriptors: dict[str, int] = {}
        self._memory: dict[str, Tensor] = {}

    def create(self, *, mapped: bool) -> bool:
        """Makes the files at their full size, headers written.

        Args:
            mapped: all ranks are on one machine. On a network file system machines that map the same page would overwrite each
                other's part of it.

        Returns:
            whether they may be mapped: also only where the file system can reserve their space, since a mapped write to a full
            disk kills the process.

        Raises:
            CheckpointError: the disk is full, or the place cannot be written.
        """
        with self._explained("prepared"):
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            for file in self._files:
                with (self.path / file.name).open("wb") as opened:
                    opened.write(file.header)
                    opened.truncate(file.nbytes)
                    mapped = mapped and _reserve(opened.fileno(), file.nbytes)
        return mapped

    def write(self, view: View, shape: Shape, source: Tensor, *, mapped: bool) -> None:
        """Writes `source`, `[*shape]` of any dtype, as a rectangle of the HF tensor `view.name`.

        Raises:
            CheckpointError: it cannot be written.
        """
        file = self._file_of[view.name]
        tensor, start = file.tensors[view.name], file.offsets[view.name]
        with self._explained("written"):
            if mapped:
                whole = self._mapped(file)[start : start + tensor.nbytes].view(tensor.dtype)
                view.of(whole, shape).copy_(source)
            else:
                rectangle = Rectangle(tensor.dtype, start + view.offset * tensor.dtype.itemsize, shape, view.strides)
                write_from(self._descriptor(file), rectangle, source)

    def finish(self) -> None:
        """This rank has written all it has: its bytes go to the disk. Raises CheckpointError if the disk refuses them."""
        self._memory.clear()
        with self._explained("written"), contextlib.ExitStack() as closing:
            for descriptor in self._descriptors.values():
                closing.callback(os.close, descriptor)
            if self._durable:
                for descriptor in self._descriptors.values():
                    os.fdatasync(descriptor)
            self._descriptors.clear()

    def publish(self) -> None:
        """Writes the index and puts the checkpoint in its place.

        Raises:
            CheckpointError: it cannot be put there.
        """
        with self._explained("published"):
            self._write_index()
            replace_directory(self.path, self.directory, durable=self._durable)

    def discard(self) -> None:
        """Removes what was staged."""
        shutil.rmtree(self.path, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            needed = sum(file.nbytes for file in self._files)
            hint = f"; it needs {needed} bytes" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
            raise CheckpointError(f"{self.directory} was not saved: {self.path} could not be {what}: {error}{hint}") from error

    def _descriptor(self, file: ShardFile) -> int:
        if file.name not in self._descriptors:
            self._descriptors[file.name] = os.open(self.path / file.name, os.O_RDWR | os.O_CLOEXEC)
        return self._descriptors[file.name]

    def _mapped(self, file: ShardFile) -> Tensor:
        """The bytes of a file, uint8 `[nbytes]`."""
        if file.name not in self._memory:
            self._descriptor(file)  # to sync it by
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


def _reserve(descriptor: int, nbytes: int) -> bool:
    """Claims the space of a whole file; returns whether the file system can. Raises OSError if it has no room."""
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(nbytes)):
        if ctypes.get_errno() in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return True
