"""Hugging Face checkpoints on disk: headers first, and then exactly the bytes that are asked for."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mbridge_rl.core.errors import CheckpointError, StateMismatchError, listed
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.plan import Plan, View
from mbridge_rl.core.segments import Shape
from mbridge_rl.hf.rectangles import Rectangle, read_into

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

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


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor lies."""

    tensor: HFTensor
    file: str
    start: int


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint directory by `hf_name`.

    `read_into` reads rectangles of them; indexing gives a whole one, mapped, of which only touched pages are read.

    Args:
        file: the only file to read, such as an adapter's; `None` takes what the index names, or the single file of weights.

    Raises:
        CheckpointError: no safetensors files, a file that the index names is missing, or a truncated or corrupt file;
            StateMismatchError: the index names tensors that its files do not hold. Only headers have been read by then.
    """

    def __init__(self, directory: str | Path, file: str | None = None) -> None:
        self.directory = Path(directory)
        weight_map = None if file else _weight_map(self.directory / INDEX_FILE)
        files = sorted(set(weight_map.values())) if weight_map is not None else [file or _single_file(self.directory)]
        self._mapped = {file: _open(self.directory / file) for file in files}
        self._entries = {
            entry.tensor.hf_name: entry
            for file in files
            for entry in _entries(self.directory, file)
            if weight_map is None or weight_map.get(entry.tensor.hf_name, file) == file
        }
        if weight_map is not None and (absent := weight_map.keys() - self._entries.keys()):
            raise StateMismatchError(f"{directory}/{INDEX_FILE} names tensors that its files do not hold: {listed(absent)}")
        self._descriptors: dict[str, int] = {}
        weakref.finalize(self, _close, self._descriptors)

    def __getitem__(self, hf_name: str) -> Tensor:
        return self._mapped[self._entries[hf_name].file].get_tensor(hf_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def tensors(self) -> dict[str, HFTensor]:
        """Names, dtypes and shapes, from the headers."""
        return {hf_name: entry.tensor for hf_name, entry in self._entries.items()}

    def load(self, plan: Plan, targets: Mapping[str, Tensor], *, read_ahead: bool = True) -> None:
        """Fills `targets` by `plan`, which leads from whole HF tensors to them. Asks for no page that they don't keep part of.

        Args:
            read_ahead: the kernel may fetch more than was asked for. Faster, and no waste where ranks of this machine keep
                the rest; where they don't, it would read what nobody needs.

        Raises:
            CheckpointError: a file became shorter or unreadable since it was opened; `targets` are incomplete then.
        """
        for file in self._mapped:
            advice = os.POSIX_FADV_NORMAL if read_ahead else os.POSIX_FADV_RANDOM
            os.posix_fadvise(self._descriptor(file), 0, 0, advice)
        for name in {name for names in plan.padded_names.values() for name in names}:
            targets[name].zero_()
        for copy in plan.copies:
            try:
                self.read_into(copy.source, copy.shape, copy.target.of(targets[copy.target.name], copy.shape))
            except CheckpointError as error:
                raise CheckpointError(f"{error}. The model is incomplete now: load it again before you use it") from error

    def read_into(self, view: View, shape: Shape, target: Tensor) -> None:
        """Fills `target`, `[*shape]` with any strides, dtype and device, with a rectangle of the tensor `view.name`.

        Raises:
            CheckpointError: the file became shorter or unreadable since it was opened.
        """
        entry = self._entries[view.name]
        dtype = entry.tensor.dtype
        rectangle = Rectangle(dtype, entry.start + view.offset * dtype.itemsize, shape, view.strides)
        path = self.directory / entry.file
        try:
            read_into(self._descriptor(entry.file), rectangle, target)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{path}: {view.name} cannot be read ({error}); is it being replaced?") from error

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self.directory / file, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[file]


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
    if (directory / SINGLE_FILE).exists():
        return SINGLE_FILE
    raise CheckpointError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors checkpoints are read")


def _open(path: Path) -> Any:
    """The file mapped by safetensors, which also checks that its header is sound and that no byte is missing."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; download or save it again") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); download or save it again") from error


def _entries(directory: Path, file: str) -> Iterator[_Entry]:
    """From a header that safetensors found sound."""
    with (directory / file).open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    for hf_name, said in header.items():
        if hf_name == "__metadata__":
            continue
        if said["dtype"] not in DTYPES:
            raise CheckpointError(f"{directory / file}: {hf_name} is {said['dtype']}, which is none of {', '.join(DTYPES)}")
        tensor = HFTensor(hf_name, DTYPES[said["dtype"]], tuple(said["shape"]))
        begin, end = said["data_offsets"]
        if end - begin != prod(tensor.shape) * tensor.dtype.itemsize:
            raise CheckpointError(f"{directory / file} is corrupt: {hf_name} has {end - begin} bytes, its shape says otherwise")
        yield _Entry(tensor, file, 8 + length + begin)


def _close(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
