"""How messages between processes become JSON types and are read again.

A message is a frozen dataclass that derives from `Message`. `encode` replaces every message in a value by an object that names
the class of the message and the schema of all messages; `decode` reads such objects strictly. Where a call crosses a process
boundary, its arguments and its result go through both.

```python
answer = decode(json.loads(json.dumps(encode([WorkerStatus(arrived=True, failure=None, proof=None, fill=None)]))))
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch

from mbridge_rl.core.errors import MessageError, listed
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.typed_values import kind, read_fields, shown

SCHEMA = 1
"""The schema of all messages together. It grows by one whenever a field of any message changes."""

T = TypeVar("T")
_CLASS, _SCHEMA = "$message", "$schema"  # no field of a message has such a name
_classes: dict[str, type[Message]] = {}


@dataclass(frozen=True)
class Message:
    """The base class of all messages; a subclass is known to `decode` by its name.

    Attributes:
        READERS: functions that read fields which are not plain JSON types and not messages, by the name of the field.
    """

    READERS: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}

    def __init_subclass__(cls) -> None:
        _classes[cls.__name__] = cls

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Reads a message of this class.

        Raises:
            MessageError: it is of another schema or class, or has wrong fields.
        """
        return require_message(decode(value), cls, "another mbridge_rl")

    def to_json(self) -> dict[str, Any]:
        """The message in plain JSON types."""
        own = {field.name: _encoded(getattr(self, field.name)) for field in fields(self)}
        return {_CLASS: type(self).__name__, _SCHEMA: SCHEMA, **own}


def encode(value: Any) -> Any:
    """Replaces the messages in a value, which may be nested in lists and mappings, by JSON types. Other values stay as they
    are."""
    if isinstance(value, Message):
        return value.to_json()
    if type(value) in (list, tuple):
        return type(value)(encode(item) for item in value)
    if type(value) is dict:
        return {name: encode(item) for name, item in value.items()}
    return value


def decode(value: Any) -> Any:
    """The inverse of `encode`. Tuples are lists afterwards if JSON text was made of them in between.

    Raises:
        MessageError: a message is of another schema or of an unknown class, or has wrong fields.
    """
    if type(value) in (list, tuple):
        return type(value)(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    if _CLASS not in value:
        return {name: decode(item) for name, item in value.items()}
    return _read(value)


def require_message(value: object, cls: type[T], sender: str) -> T:
    """Checks that a peer sent a message of the class `cls`.

    Raises:
        MessageError: it sent something else; names the `sender`.
    """
    if not isinstance(value, cls):
        raise MessageError(
            f"{sender} sent {type(value).__name__}, expected the message {cls.__name__} of schema {SCHEMA}: install the same "
            "mbridge_rl on trainer and engines"
        )
    return value


def record_of(report: Message) -> dict[str, Any]:
    """The fields of a report without its time spans, which the record of a sync holds in another place."""
    own = {field.name: getattr(report, field.name) for field in fields(report) if field.name != "spans"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}


def tensors_from_json(values: Any) -> tuple[HFTensor, ...]:
    """Reads the HF tensors of a message."""
    return tuple(HFTensor(hf_name, dtype_of(dtype), tuple(map(int, shape))) for hf_name, dtype, shape in values)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of this name, such as "bfloat16".

    Raises:
        ValueError: torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of torch")
    return dtype


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _encoded(value: Any) -> Any:
    """A field's value in JSON types."""
    if isinstance(value, HFTensor):
        return [value.hf_name, name_of(value.dtype), list(value.shape)]
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _encoded(item) for name, item in value.items()}
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _read(value: Mapping[str, Any]) -> Message:
    name, schema = value[_CLASS], value.get(_SCHEMA)
    if schema != SCHEMA:
        raise MessageError(
            f"the message {shown(name)} has schema {shown(schema)}, this mbridge_rl has schema {SCHEMA}: install the same "
            "mbridge_rl on trainer and engines"
        )
    cls = _classes.get(name) if isinstance(name, str) else None
    if cls is None:
        raise MessageError(f"there is no message {shown(name)} in schema {SCHEMA}: is the other end a fork of mbridge_rl?")
    own = {field: item for field, item in value.items() if field not in (_CLASS, _SCHEMA)}
    try:
        own = {field: cls.READERS.get(field, decode)(item) for field, item in own.items()}
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise MessageError(f"the message {name} cannot be read: {type(error).__name__}: {error}") from error
    problems: list[str] = []
    message = read_fields(cls, own, problems, path=name)
    if message is None:
        raise MessageError(f"the message {name} has wrong fields: {listed(problems)}; found {kind(value)}")
    return message
