"""The messages of an adapter's sync, which has one step: `AdapterUpdate` from the trainer, and back an `AdapterReport`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.typed_values import AtLeastOne, AtLeastZero
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.payload.message_codec import Message, record_of, tensors_from_json
from mbridge_rl.sync.record.timeline import Span


@dataclass(frozen=True)
class AdapterUpdate(Message):
    """A version of an adapter.

    Attributes:
        adapter: the name of the adapter.
        version: the version that arrives.
        is_policy: whether the adapter's versions are the engine's own.
        requests: what happens to requests in flight.
        timeout: seconds to wait for them.
        rank: the largest rank of the adapter's factors.
        tensors: the factors, in PEFT's names.
        offsets: the first byte of each factor.
        digests: the digest of each factor, 16 hex digits.
        arena_path: the trainer's shared memory that holds the bytes.
        arena_bytes: bytes of that memory.
        content: the bytes in base64, for an engine on another machine.
    """

    adapter: str
    version: int
    is_policy: bool
    requests: InFlight
    timeout: float
    rank: AtLeastOne
    tensors: tuple[HFTensor, ...]
    offsets: tuple[AtLeastZero, ...]
    digests: tuple[str, ...]
    arena_path: str
    arena_bytes: int
    content: str | None = field(default=None, repr=False)

    READERS: ClassVar = {"tensors": tensors_from_json}


@dataclass(frozen=True)
class AdapterModule(Message):
    """The two factors of one adapted module."""

    tensors: tuple[HFTensor, ...]

    READERS: ClassVar = {"tensors": tensors_from_json}


@dataclass(frozen=True)
class AdapterSlotsInfo(Message):
    """What an engine can hold.

    Attributes:
        dtype: the dtype of the slots.
        slots: number of slots.
        max_rank: largest rank of an adapter.
        host: the machine id.
    """

    dtype: str
    slots: int
    max_rank: int
    host: str


@dataclass(frozen=True)
class ServedAdapter(Message):
    """An adapter in a slot of a worker."""

    name: str
    slot_id: int
    version: int


@dataclass(frozen=True)
class SlotReport(Message):
    """The commit of an adapter in a worker.

    Attributes:
        tensors: number of factors.
        bytes: bytes of the factors.
        digest: the digest of all factors together.
        proven: number of factors that were read back from the slot.
    """

    tensors: int
    bytes: int
    digest: str
    proven: int


@dataclass(frozen=True)
class AdapterReport(Message):
    """The commit of an adapter in an engine; for the other attributes see `SlotReport`.

    Attributes:
        adapter: the name of the adapter.
        version: the version that is served now.
        spans: the time spans of the engine.
    """

    adapter: str
    version: int
    tensors: int
    bytes: int
    digest: str
    proven: int
    spans: tuple[Span, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """The report without its time spans, for the record of a sync."""
        return record_of(self)
