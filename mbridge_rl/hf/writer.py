"""Writing a Hugging Face checkpoint without gathering it: headers are computed from the plan, files are mapped, and every rank
writes the rectangles that it holds. Files appear under their names only when all of them are complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mbridge_rl.core.segments import Shape
from mbridge_rl.hf.checkpoint import INDEX_FILE, SINGLE_FILE

DEFAULT_SHARD_BYTES = 5 << 30
_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file to be: its header, and where each tensor begins, in bytes."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    shapes: Mapping[str, Shape]
    nbytes: int


def plan_files(hf_shapes: Mapping[str, Shape], dtype: torch.dtype, shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[ShardFile]:
    """Deals tensors, in order, to files of at most `shard_bytes` (a larger tensor gets a file of its own)."""
    groups: list[dict[str, Shape]] = [{}]
    filled = 0
    for hf_name, shape in hf_shapes.items():
        nbytes = prod(shape) * dtype.itemsize
        if groups[-1] and filled + nbytes > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][hf_name] = shape
        filled += nbytes
    if len(groups) == 1:
        return [_shard_file(SINGLE_FILE, groups[0], dtype)]
    count = len(groups)
    return [_shard_file(f"model-{i:05}-of-{count:05}.safetensors", group, dtype) for i, group in enumerate(groups, 1)]


def _shard_file(name: str, shapes: Mapping[str, Shape], dtype: torch.dtype) -> ShardFile:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for hf_name, shape in shapes.items():
        offsets[hf_name], begin = end, end
        end += prod(shape) * dtype.itemsize
        header[hf_name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns data to 8 bytes by padding the header
    start = 8 + len(text)
    offsets = {hf_name: start + offset for hf_name, offset in offsets.items()}
    return ShardFile(name, len(text).to_bytes(8, "little") + text, offsets, shapes, start + end)


class StagingDirectory:
    """Files under construction beside `directory`, moved into it by `publish`. One process creates and publishes; all map."""

    def __init__(self, directory: str | Path, files: list[ShardFile]) -> None:
        self.directory = Path(directory)
        self.path = self.directory.parent / f".{self.directory.name}.incomplete"
        self._files = files

    def create(self) -> None:
        """Makes the files at their full size, headers written."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        for file in self._files:
            with (self.path / file.name).open("wb") as opened:
                opened.write(file.header)
                os.posix_fallocate(opened.fileno(), 0, file.nbytes)  # a full disk shows now, not as a bus error later

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every HF tensor as a writable view of its mapped file."""
        views = {}
        for file in self._files:
            storage = torch.UntypedStorage.from_file(str(self.path / file.name), shared=True, nbytes=file.nbytes)
            data = torch.empty(0, dtype=torch.uint8).set_(storage)
            for hf_name, offset in file.offsets.items():
                shape = file.shapes[hf_name]
                views[hf_name] = data[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
        return views

    def publish(self) -> None:
        """Writes the index and moves everything in place, index last; weights of an older checkpoint are removed."""
        self._write_index()
        self.directory.mkdir(parents=True, exist_ok=True)
        for old in [*self.directory.glob("model*.safetensors"), self.directory / INDEX_FILE]:
            old.unlink(missing_ok=True)
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == INDEX_FILE):
            path.replace(self.directory / path.name)
        self.path.rmdir()

    def _write_index(self) -> None:
        if len(self._files) == 1:
            return
        weight_map = {hf_name: file.name for file in self._files for hf_name in file.offsets}
        total = sum(file.nbytes - len(file.header) for file in self._files)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.path / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
