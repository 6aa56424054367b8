"""Hugging Face checkpoints on disk: reads the headers first, and then exactly the requested bytes."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mbridge_rl.core.errors import CheckpointError, StateMismatchError, listed
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.plan import Plan, View
from mbridge_rl.core.segments import Shape
from mbridge_rl.core.typed_values import shown
from mbridge_rl.hf.header import Entry, read_header
from mbridge_rl.hf.json_files import open_file, read_json
from mbridge_rl.hf.rectangles import Rectangle, read_into, read_many
from mbridge_rl.hf.weight_files import INDEX_FILE, SINGLE_FILE, require_one_copy, require_one_set, require_safetensors

_MOST_INDEX_BYTES = 256 << 20


@dataclass(frozen=True)
class _Index:
    """An index file: which file of the directory holds each tensor."""

    weight_map: Mapping[str, str]

    def __post_init__(self) -> None:
        for file in sorted(set(self.weight_map.values())):
            if not _is_inside(file):
                raise ValueError(f"weight_map names the file {shown(file)}; only files of the checkpoint's directory are read")


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint directory by `hf_name`.

    `load` and `read_into` read rectangles of tensors; indexing returns a full tensor, mapped, of which only the accessed pages
    are read. Files stay open, so that a file that is replaced meanwhile is still read in its old version.

    Args:
        file: the only file to read, such as an adapter's; `None` reads the files that the index names, or the single file of
            weights.

    Attributes:
        entries: the header's entry of each tensor.

    Raises:
        CheckpointError: there are no safetensors files, other programs would read other files of the directory
            (`hf.weight_files`), a file that the index names is missing, or a file is truncated or corrupt. Only headers have
            been read by then.
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
            self._files[file] = open_file(self.directory / file)
        headers = {file: dict(read_header(self._files[file], self.directory / file, file)) for file in files}
        require_one_copy(self.directory, headers)
        self.entries: dict[str, Entry] = {
            hf_name: entry
            for file, header in headers.items()
            for hf_name, entry in header.items()
            if weight_map is None or weight_map.get(hf_name, file) == file
        }
        if weight_map is not None and (absent := weight_map.keys() - self.entries.keys()):
            raise StateMismatchError(f"{directory}/{INDEX_FILE} names tensors that its files do not hold: {listed(absent)}")
        self._mapped: dict[str, mmap.mmap] = {}

    def __getitem__(self, hf_name: str) -> Tensor:
        file, dtype, shape, start = self.entries[hf_name]
        if file not in self._mapped:  # a private mapping: writes to the tensor do not change the file
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
        """The names, dtypes and shapes in the headers."""
        return {hf_name: HFTensor(hf_name, entry.dtype, entry.shape) for hf_name, entry in self.entries.items()}

    def load(self, plan: Plan, targets: Mapping[str, Tensor], *, read_ahead: bool = True) -> None:
        """Fills `targets` by `plan`, whose source are full HF tensors, file by file in the order of their bytes. Reads only
        pages of which the targets need a part.

        Args:
            read_ahead: whether the kernel may read more than was requested. This is faster, and no waste if other ranks of this
                machine need the rest; otherwise it would read bytes that are not needed.

        Raises:
            CheckpointError: a file has become shorter or unreadable since it was opened; `targets` are incomplete then.
        """
        for name in {name for names in plan.padded_names.values() for name in names}:
            targets[name].zero_()
        requests: dict[str, list[tuple[str, Rectangle, Tensor]]] = {file: [] for file in self._files}
        for copy in plan.copies:
            file, rectangle = self._rectangle(copy.source, copy.shape)
            requests[file].append((copy.hf_name, rectangle, copy.target.of(targets[copy.target.name], copy.shape)))
        for file, file_requests in requests.items():
            descriptor = self._files[file]
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL if read_ahead else os.POSIX_FADV_RANDOM)
            try:
                read_many(descriptor, file_requests)
            except (OSError, EOFError) as error:
                raise CheckpointError(
                    f"{self.directory / file} cannot be read ({error}); is it being replaced? The model is incomplete now: "
                    "load it again before you use it"
                ) from error

    def read_into(self, view: View, shape: Shape, target: Tensor) -> None:
        """Fills `target`, `[*shape]` with any strides, dtype and device, with a rectangle of the tensor `view.name`.

        Raises:
            CheckpointError: the file has become shorter or unreadable since it was opened.
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


def _weight_map(index: Path) -> Mapping[str, str] | None:
    if not index.parent.is_dir():
        raise CheckpointError(f"{index.parent} is not a directory; give the folder of a Hugging Face checkpoint")
    if not os.path.lexists(index):
        return None
    weight_map = read_json(index, _Index, most_bytes=_MOST_INDEX_BYTES).weight_map
    if not weight_map:
        raise CheckpointError(f"{index}: weight_map is empty; download or save the checkpoint again")
    return weight_map


def _is_inside(file: str) -> bool:
    """Whether a path is relative and stays in its directory. Links are allowed: the hub's cache consists of them."""
    return file != "" and not os.path.isabs(file) and not {"", ".", ".."} & set(file.split("/"))


def _single_file(directory: Path) -> str:
    require_safetensors(directory)
    return SINGLE_FILE


def _close(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
