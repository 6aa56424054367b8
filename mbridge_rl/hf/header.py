"""Reads the headers of safetensors files and checks them against the file's size before any data is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch

from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.json_text import parse_json
from mbridge_rl.core.segments import Shape
from mbridge_rl.core.typed_values import is_text, kind, shown

# The format's names of dtypes. A file with a dtype that torch does not have (4-bit floats) is refused.
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

_MOST_BYTES = 100_000_000  # of a header; the limit of the safetensors library
_FIELDS = {"dtype", "shape", "data_offsets"}
_MOST_DIMS = 64  # of a tensor; the limit of torch
_MOST_BYTES_OF_A_TENSOR = 2**63  # the limit of torch


class Entry(NamedTuple):
    """A tensor in a file: its dtype and shape by the file's header, and the byte at which its data starts."""

    file: str
    dtype: torch.dtype
    shape: Shape
    start: int

    def piece(self, first: int, shape: Shape) -> Entry:
        """The entry of the tensor's elements from element `first` on, as a tensor `[*shape]`."""
        return self._replace(shape=shape, start=self.start + first * self.dtype.itemsize)


def read_header(descriptor: int, path: Path, file: str) -> Iterator[tuple[str, Entry]]:
    """Yields the tensors of a file in the order of their bytes, and checks the header: the tensors fill the file without gaps,
    and each has the number of bytes of its shape.

    Raises:
        CheckpointError: the header is wrong, or names a dtype that torch does not have.
    """
    try:
        size = os.fstat(descriptor).st_size
        data = 8 + int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if not 8 < data <= size:
            raise ValueError(f"a header of {data - 8} bytes in a file of {size}")
        if data - 8 > _MOST_BYTES:
            raise ValueError(f"a header of {data - 8:,} bytes; at most {_MOST_BYTES:,} are allowed")
        header = parse_json(os.pread(descriptor, data - 8, 8), most_bytes=_MOST_BYTES)
        if not isinstance(header, dict):
            raise ValueError(f"the header must be an object, found {kind(header)}")
        _check_metadata(header.pop("__metadata__", {}))
        tensors = [_tensor(path, hf_name, fields) for hf_name, fields in header.items()]
        end = 0
        for start, stop, hf_name, dtype, shape in sorted(tensors, key=lambda tensor: tensor[:2]):
            if start != end:
                raise ValueError(f"{hf_name} begins at byte {data + start}, the one before it ends at {data + end}")
            end = stop
            yield hf_name, Entry(file, dtype, shape, data + start)
        if data + end != size:
            raise ValueError(f"its tensors end at byte {data + end} of {size}")
    except CheckpointError:
        raise
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); download or save it again") from error


def _check_metadata(metadata: object) -> None:
    texts = [text for pair in metadata.items() for text in pair] if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) and is_text(text) for text in texts):
        raise ValueError(f"__metadata__ must map names to text, found {kind(metadata)}")


def _tensor(path: Path, hf_name: str, fields: object) -> tuple[int, int, str, torch.dtype, Shape]:
    """The begin and the end of the data in bytes, the name, the dtype and the shape of a header's entry. It is checked here and
    not by `read_fields` for speed: large models have a hundred thousand entries."""
    if not is_text(hf_name) or not isinstance(fields, dict) or fields.keys() != _FIELDS:
        actual = shown(list(fields)) if isinstance(fields, dict) else kind(fields)
        raise ValueError(f"{shown(hf_name)} must be an object with dtype, shape and data_offsets, found {actual}")
    shape, offsets, name = fields.get("shape"), fields.get("data_offsets"), fields.get("dtype")
    if not _are_sizes(shape):
        raise ValueError(f"{hf_name}: shape must be a list of at most {_MOST_DIMS} whole numbers, found {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{hf_name}: data_offsets must be the first byte and the one behind the last, found {shown(offsets)}")
    if not isinstance(name, str) or name not in DTYPES:
        raise CheckpointError(f"{path}: {hf_name} is {shown(name)}, which is none of {', '.join(DTYPES)}")
    dtype, (start, stop) = DTYPES[name], offsets
    if prod(max(size, 1) for size in shape) * dtype.itemsize >= _MOST_BYTES_OF_A_TENSOR:
        raise ValueError(f"{hf_name}: no tensor can have the shape {shape}")
    if stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"{hf_name} has {stop - start} bytes, its shape {shape} says otherwise")
    return start, stop, hf_name, dtype, tuple(shape)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list) and len(value) <= _MOST_DIMS and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )
