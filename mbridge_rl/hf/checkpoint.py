"""Hugging Face checkpoints on disk: headers first, and then exactly the bytes that are asked for."""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbridge_rl.core.errors import CheckpointError, StateMismatchError, listed
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.plan import Plan, View
from mbridge_rl.core.segments import Shape
from mbridge_rl.hf.rectangles import Rectangle, read_into, read_many
from mbridge_rl.hf.weight_files import INDEX_FILE, SINGLE_FILE, require_one_copy, require_one_set, require_safetensors

# The format's names of dtypes. What torch cannot name (4-bit floats) is refused with the file.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class Entry(NamedTuple):
    """What a file says of a tensor, and at which byte of it the tensor lies."""

    file: str
    dtype: torch.dtype
    shape: Shape
    start: int

    def piece(self, first: int, shape: Shape) -> Entry:
        """Of a run of elements of the tensor, from element `first` on, `[*shape]`."""
        return self._replace(shape=shape, start=self.start + first * self.dtype.itemsize)


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint directory by `hf_name`.

    `load` and `read_into` read rectangles of them; indexing gives a whole one, mapped, of which only touched pages are read.
    Files stay open, so that one that is replaced meanwhile is read as it was.

    Args:
        file: the only file to read, such as an adapter's; `None` takes what the index names, or the single file of weights.

    Attributes:
        entries: what the headers say of each tensor.

    Raises:
        CheckpointError: no safetensors files, files of which other programs would read others (`hf.weight_files`), a file that
            the index names is missing, or a truncated or corrupt file;
            StateMismatchError: the index names tensors that its files do not hold. Only headers have been read by then.
    """

    def __init__(self, directory: str | Path, file: str | None = None) -> None:
        self.directory = Path(directory)
        weight_map = None if file else _weight_map(self.directory / INDEX_FILE)
        if weight_map is not None:
            require_one_set(self.directory, weight_map)
        files = sorted(set(weight_map.values())) if weight_map is not None else [file or _single_file(self.directory)]
        self._files: dict[str, int] = {}
        weakref.finalize(self, _close, self._files)
        for file in files:
            self._files[file] = _open(self.directory / file)
        headers = {file: dict(_entries(self._files[file], self.directory, file)) for file in files}
        require_one_copy(self.directory, headers)
        self.entries: dict[str, Entry] = {
            hf_name: entry
            for file, of_file in headers.items()
            for hf_name, entry in of_file.items()
            if weight_map is None or weight_map.get(hf_name, file) == file
        }
        if weight_map is not None and (absent := weight_map.keys() - self.entries.keys()):
            raise StateMismatchError(f"{directory}/{INDEX_FILE} names tensors that its files do not hold: {listed(absent)}")
        self._mapped: dict[str, mmap.mmap] = {}

    def __getitem__(self, hf_name: str) -> Tensor:
        file, dtype, shape, start = self.entries[hf_name]
        if file not in self._mapped:  # private: nothing that is written to the tensor reaches the file
            self._mapped[file] = mmap.mmap(self._files[file], 0, access=mmap.ACCESS_COPY)
        nbytes = prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        content = torch.frombuffer(self._mapped[file], dtype=torch.uint8, count=nbytes, offset=start)
        return (content if start % dtype.itemsize == 0 else content.clone()).view(dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def tensors(self) -> dict[str, HFTensor]:
        """Names, dtypes and shapes, from the headers."""
        return {hf_name: HFTensor(hf_name, entry.dtype, entry.shape) for hf_name, entry in self.entries.items()}

    def load(self, plan: Plan, targets: Mapping[str, Tensor], *, read_ahead: bool = True) -> None:
        """Fills `targets` by `plan`, which leads from whole HF tensors to them, file by file in the order of their bytes. Asks
        for no page that they don't keep part of.

        Args:
            read_ahead: the kernel may fetch more than was asked for. Faster, and no waste where ranks of this machine keep
                the rest; where they don't, it would read what nobody needs.

        Raises:
            CheckpointError: a file became shorter or unreadable since it was opened; `targets` are incomplete then.
        """
        for name in {name for names in plan.padded_names.values() for name in names}:
            targets[name].zero_()
        requests: dict[str, list[tuple[str, Rectangle, Tensor]]] = {file: [] for file in self._files}
        for copy in plan.copies:
            file, rectangle = self._rectangle(copy.source, copy.shape)
            requests[file].append((copy.hf_name, rectangle, copy.target.of(targets[copy.target.name], copy.shape)))
        for file, of_file in requests.items():
            descriptor = self._files[file]
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL if read_ahead else os.POSIX_FADV_RANDOM)
            try:
                read_many(descriptor, of_file)
            except (OSError, EOFError) as error:
                raise CheckpointError(
                    f"{self.directory / file} cannot be read ({error}); is it being replaced? The model is incomplete now: "
                    "load it again before you use it"
                ) from error

    def read_into(self, view: View, shape: Shape, target: Tensor) -> None:
        """Fills `target`, `[*shape]` with any strides, dtype and device, with a rectangle of the tensor `view.name`.

        Raises:
            CheckpointError: the file became shorter or unreadable since it was opened.
        """
        file, rectangle = self._rectangle(view, shape)
        try:
            read_into(self._files[file], rectangle, target)
        except (OSError, EOFError) as error:
            path = self.directory / file
            raise CheckpointError(f"{path}: {view.name} cannot be read ({error}); is it being replaced?") from error

    def _rectangle(self, view: View, shape: Shape) -> tuple[str, Rectangle]:
        file, dtype, _, start = self.entries[view.name]
        return file, Rectangle(dtype, start + view.offset * dtype.itemsize, shape, view.strides)


def _weight_map(index: Path) -> dict[str, str] | None:
    if not index.parent.is_dir():
        raise CheckpointError(f"{index.parent} is not a directory; give the folder of a Hugging Face checkpoint")
    if not index.exists():
        return None
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error}; download or save the checkpoint again") from error
    return weight_map


def _single_file(directory: Path) -> str:
    require_safetensors(directory)
    return SINGLE_FILE


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; download or save it again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _entries(descriptor: int, directory: Path, file: str) -> Iterator[tuple[str, Entry]]:
    """From a header that is sound: its tensors fill the file, one after the other, and each as its shape says."""
    path = directory / file
    try:
        size = os.fstat(descriptor).st_size
        data = 8 + int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if not 8 < data <= size:
            raise ValueError(f"a header of {data - 8} bytes in a file of {size}")
        header: dict[str, Any] = json.loads(os.pread(descriptor, data - 8, 8))
        header.pop("__metadata__", None)
        end = data
        for hf_name, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, start = DTYPES.get(said["dtype"]), tuple(said["shape"]), data + said["data_offsets"][0]
            if dtype is None:
                raise CheckpointError(f"{path}: {hf_name} is {said['dtype']}, which is none of {', '.join(DTYPES)}")
            if start != end:
                raise ValueError(f"{hf_name} begins at byte {start}, the one before it ends at {end}")
            end = data + said["data_offsets"][1]
            if end - start != prod(shape) * dtype.itemsize:
                raise ValueError(f"{hf_name} has {end - start} bytes, its shape {list(shape)} says otherwise")
            yield hf_name, Entry(file, dtype, shape, start)
        if end != size:
            raise ValueError(f"its tensors end at byte {end} of {size}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); download or save it again") from error


def _close(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
