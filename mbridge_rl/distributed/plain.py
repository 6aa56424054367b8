"""Plain data as bytes, for messages between processes. Reading a message runs no code, whatever it holds.

    eight bytes: the length of the JSON | JSON | the bytes of all tensors, one after another

JSON carries `None`, booleans, numbers and texts as they are. Everything else is a list of its kind and its content: bytes,
dtypes, lists, tuples, sets, dictionaries, tensors, and the dataclasses that the reader names.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from mbridge_rl.core.errors import SyncError

Types = Sequence[type]
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_LENGTH = 8


def dumped(value: Any, types: Types = ()) -> bytes:
    """`value` as a message.

    Raises:
        SyncError: something in it is not plain data; names its type.
    """
    tensors: list[Tensor] = []
    text = json.dumps(_described(value, types, tensors)).encode()
    contents = (tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)
    return b"".join((len(text).to_bytes(_LENGTH, "little"), text, *contents))


def loaded(message: bytes, types: Types = ()) -> Any:
    """The value from which `dumped` made a message.

    Raises:
        SyncError: it is not such a message, or its content does not match its description.
    """
    try:
        end = _LENGTH + int.from_bytes(message[:_LENGTH], "little")
        reader = _Reader(memoryview(message)[end:], {kind.__name__: kind for kind in types})
        value = reader.read(json.loads(message[_LENGTH:end]))
        if reader.unread:
            raise ValueError(f"{len(reader.unread)} bytes too many")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise SyncError(f"a message of {len(message)} bytes is not what this version reads: {error!r}") from error
    return value


def _described(value: Any, types: Types, tensors: list[Tensor]) -> Any:
    def all_of(values: Any) -> list[Any]:
        return [_described(item, types, tensors) for item in values]

    if value is None or type(value) in (bool, int, float, str):
        return value
    match value:
        case bytes():
            return ["bytes", base64.b64encode(value).decode()]
        case torch.dtype():
            return ["dtype", str(value).removeprefix("torch.")]
        case Tensor():
            tensors.append(value.detach().cpu())
            return ["tensor", str(value.dtype).removeprefix("torch."), list(value.shape)]
        case list() | tuple():
            return ["list" if isinstance(value, list) else "tuple", all_of(value)]
        case set() | frozenset():
            return ["set", all_of(value)]
        case Mapping():
            return ["dict", [all_of(item) for item in value.items()]]
    if is_dataclass(value) and type(value) in types:
        names = [field.name for field in fields(value)]
        return [type(value).__name__, dict(zip(names, all_of(getattr(value, name) for name in names), strict=True))]
    raise SyncError(f"a {type(value).__name__} is not plain data and does not travel between processes: {value!r:.100}")


class _Reader:
    """Reads values from their JSON description and the bytes of their tensors.

    Attributes:
        unread: the bytes of the tensors that were not read yet.
    """

    def __init__(self, tensor_bytes: memoryview, types: Mapping[str, type]) -> None:
        self.unread, self._types = tensor_bytes, types
        self._kinds: Mapping[str, Callable[..., Any]] = {
            "bytes": lambda text: base64.b64decode(text, validate=True),
            "dtype": lambda name: _DTYPES[name],
            "tensor": self._tensor,
            "list": self._all,
            "tuple": lambda values: tuple(self._all(values)),
            "set": lambda values: frozenset(self._all(values)),
            "dict": lambda items: dict(map(self._all, items)),
        }

    def read(self, described: Any) -> Any:
        if not isinstance(described, list):
            if isinstance(described, dict):
                raise TypeError("a dictionary without its kind")
            return described
        kind, *content = described
        if kind in self._kinds:
            return self._kinds[kind](*content)
        (values,) = content
        return self._types[kind](**{name: self.read(value) for name, value in values.items()})

    def _all(self, values: list[Any]) -> list[Any]:
        return [self.read(value) for value in values]

    def _tensor(self, dtype_name: str, shape: list[int]) -> Tensor:
        dtype = _DTYPES[dtype_name]
        nbytes = prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or nbytes > len(self.unread):
            raise ValueError(f"{len(self.unread)} bytes for a tensor {dtype_name}{shape}")
        content, self.unread = bytearray(self.unread[:nbytes]), self.unread[nbytes:]
        flat = torch.frombuffer(content, dtype=torch.uint8) if nbytes else torch.empty(0, dtype=torch.uint8)
        return flat.view(dtype).view(shape)
