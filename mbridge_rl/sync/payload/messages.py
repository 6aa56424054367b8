"""The messages that trainer, engines and engine workers send each other in a sync of weights, in the order of the seven verbs.

| verb | from the trainer | back |
| --- | --- | --- |
| describe | `Announcement` | a `WorkerDescription` from each worker |
| adopt | `Introduction` | |
| begin | `UpdateRequest`, with the `Wire` of its transport | |
| status | | a `WorkerStatus` from each worker |
| commit | version, requests, time-out | a `CommitReport`, made of a `WorkerReport` from each worker |
| abort | reason | |
| publish | paths | the fingerprint of each worker's route |

`wires` has the wires of all transports, `adapter_messages` the messages of adapters. `message_codec` turns messages into JSON
types and compares their schema.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from mbridge_rl.core.failure import Failure
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.segments import Shape
from mbridge_rl.core.typed_values import AtLeastOne, AtLeastZero
from mbridge_rl.sync.options import InFlight, Mode
from mbridge_rl.sync.payload.landing import Landing, ShapedView
from mbridge_rl.sync.payload.message_codec import Message, dtype_of, name_of, record_of, tensors_from_json
from mbridge_rl.sync.payload.route import WorkerRoute
from mbridge_rl.sync.payload.wires import Wire
from mbridge_rl.sync.record.timeline import Span

# describe


@dataclass(frozen=True)
class Announcement(Message):
    """The first message of a trainer: the HF tensors that every sync will bring, before anything is planned.

    Attributes:
        tensors: name, dtype and shape of every HF tensor.
        config: the trainer's `compatibility.config_summary`; if it is empty, configs are not compared.
        optional: names of tensors for which the engine may have no place (`ModelSpec.optional_hf_names`).
        fingerprint: `fingerprint_of_tensors` of the tensors, as the trainer computed it.
    """

    tensors: tuple[HFTensor, ...]
    config: Mapping[str, Any]
    optional: tuple[str, ...]
    fingerprint: str

    READERS: ClassVar = {"tensors": tensors_from_json}

    @classmethod
    def of(
        cls, tensors: Iterable[HFTensor], config: Mapping[str, Any] | None = None, optional: Collection[str] = ()
    ) -> Announcement:
        tensors = tuple(tensors)
        return cls(tensors, dict(config or {}), tuple(sorted(optional)), fingerprint_of_tensors(tensors))


@dataclass(frozen=True)
class WorkerDescription(Message):
    """One worker of an engine.

    Attributes:
        rank: the rank of the worker in its engine.
        size: the number of workers of the engine.
        host: the machine id, which is equal for processes that can share memory.
        parameters: `{name: (dtype, shape)}` of the parameters that landings write to.
        landings: the landings by `hf_name`, in the loader's order.
        unsplit: `{hf_name: reason}` of the tensors that only the worker's own loader can place, so that they go to it unsplit.
    """

    rank: AtLeastZero
    size: AtLeastOne
    host: str
    parameters: Mapping[str, tuple[torch.dtype, Shape]]
    landings: Mapping[str, tuple[Landing, ...]]
    unsplit: Mapping[str, str]

    READERS: ClassVar = {
        "parameters": lambda values: {name: (dtype_of(dtype), tuple(shape)) for name, (dtype, shape) in values.items()},
        "landings": lambda values: {hf_name: _landings_from_json(hf_name, parts) for hf_name, parts in values.items()},
    }

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {
            "parameters": {name: [name_of(dtype), list(shape)] for name, (dtype, shape) in self.parameters.items()},
            "landings": {
                hf_name: [
                    [part.parameter_name, part.source.shape, part.source.offset, part.source.strides, part.target.offset,
                     part.target.strides]
                    for part in parts
                ]
                for hf_name, parts in self.landings.items()
            },
        }  # fmt: skip


# adopt


@dataclass(frozen=True)
class Introduction(Message):
    """The second message of a trainer, made from the descriptions of all workers: the routes that every sync will follow. A
    weight store keeps it beside its images, for later readers.

    Attributes:
        routes: the routes of all workers.
        fingerprint: `Route.fingerprint`, as the trainer computed it.
        verify: whether digests travel with the weights.
        workers: the descriptions from which the routes were planned.
        announcement: the announcement that the workers answered.
        model: the fingerprint of the trainer's model spec.
    """

    routes: tuple[WorkerRoute, ...]
    fingerprint: str
    verify: bool
    workers: tuple[WorkerDescription, ...]
    announcement: Announcement
    model: str

    READERS: ClassVar = {"routes": lambda values: tuple(WorkerRoute.from_json(route) for route in values)}

    @cached_property
    def as_json(self) -> dict[str, Any]:
        """`to_json`, computed once."""
        return self.to_json()


# begin


@dataclass(frozen=True)
class DeltaBase(Message):
    """Says that a version arrives as changes.

    Attributes:
        proofs: by worker, the proof of the weights that the changes start from.
        sizes: by worker, the bytes of each part, in order.
    """

    proofs: tuple[str, ...]
    sizes: tuple[tuple[AtLeastZero, ...], ...]


@dataclass(frozen=True)
class HostStore(Message):
    """The weight store in which workers on other hosts than the trainer's keep their images.

    Attributes:
        name: the name of the store.
        directory: the directory of the store.
        temporary: whether the store ends with its last user.
        session: identifies the trainer among those that write to the store (`store.writer_lock`).
        token: the token of the slot that the update fills.
        sizes: bytes of the images of all workers.
    """

    name: str
    directory: str
    temporary: bool
    session: str
    token: str
    sizes: tuple[AtLeastZero, ...]


@dataclass(frozen=True)
class UpdateRequest(Message):
    """Begins the update to a version.

    Attributes:
        version: the version that arrives.
        fill: the unique name of the update; its version may come again.
        fingerprint: the fingerprint of the sender's route.
        mode: how the bytes replace the live weights.
        wire: how the worker reaches the sender.
        timeout: seconds, for every single wait.
        requests: what happens to requests in flight if generation is held from the beginning (`streaming`).
        store: where the image is kept if it comes from another host; `None` if `wire` leads to a store.
        delta: set if the version arrives as changes.
    """

    version: int
    fill: str
    fingerprint: str
    mode: Mode
    wire: Wire
    timeout: float
    requests: InFlight = "keep"
    store: HostStore | None = None
    delta: DeltaBase | None = None


# status and commit


@dataclass(frozen=True)
class WorkerStatus(Message):
    """The progress of a worker's update.

    Attributes:
        arrived: whether everything has arrived and, in mode `staged`, was verified.
        failure: the error of receiving, also of an update that was dropped.
        proof: the proof of the live weights (`packing.proof_of`); `None` if they are of no verified version.
        fill: the fill that brought the live weights.
    """

    arrived: bool
    failure: Failure | None = None
    proof: str | None = None
    fill: str | None = None


@dataclass(frozen=True)
class WorkerIdentity(Message):
    """What a worker serves.

    Attributes:
        refusal: why it refuses to generate; `None` if it does not.
        fill: the fill that brought its weights.
    """

    refusal: str | None
    fill: str | None


@dataclass(frozen=True)
class WorkerReport(Message):
    """One worker's commit.

    Attributes:
        version: the version that the worker serves now.
        fill: the fill that it serves now.
        rank: the rank of the worker.
        bytes: bytes that came over the wire, with alignment and digests.
        digests: by `hf_name`, in hex, the digests of what this worker holds and no other worker counts.
        unsplit: the names of the tensors that the engine's own loader took.
        seconds: seconds by phase.
        spans: the time spans of the update.
    """

    version: int
    fill: str
    rank: AtLeastZero
    bytes: int
    digests: Mapping[str, str]
    unsplit: tuple[str, ...]
    seconds: Mapping[str, float]
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class CommitReport(Message):
    """The commit of an engine: what its workers report, together.

    Attributes:
        version: the version that the engine serves now.
        fill: the fill that it serves now.
        workers: number of workers.
        bytes: bytes that came over the wire, with alignment and digests.
        bytes_per_worker: the same, by worker.
        digest: the digest of all weights together; `None` without verification.
        proven_live: number of tensors whose live parameters were digested.
        proven_received: number of tensors that the engine's own loader took, whose received bytes were digested.
        seconds: by phase, the seconds of the worker that took longest; `pause` is the time in which the engine did not
            generate.
        spans: the time spans of the engine and its workers.
    """

    version: int
    fill: str
    workers: AtLeastOne
    bytes: int
    bytes_per_worker: tuple[int, ...]
    digest: str | None
    proven_live: AtLeastZero
    proven_received: AtLeastZero
    seconds: Mapping[str, float]
    spans: tuple[Span, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """The report without its time spans, for the record of a sync."""
        return record_of(self)


# every call


@dataclass(frozen=True)
class WorkerCall(Message):
    """A call of a function in all workers of an engine, so that calls without other messages have a schema, too.

    Attributes:
        function: the name of the function.
        arguments: its arguments, which are messages or JSON types.
    """

    function: str
    arguments: tuple[object, ...] = ()


@dataclass(frozen=True)
class Answer(Message):
    """A worker's answer to a call: its result, or its failure."""

    result: object = None
    failure: Failure | None = None


def fingerprint_of_tensors(tensors: Iterable[HFTensor]) -> str:
    """Short hex digest of names, dtypes and shapes, independent of their order. Nothing is sent unless both ends have it."""
    lines = sorted(f"{tensor.hf_name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n" for tensor in tensors)
    return hashlib.blake2b("".join(lines).encode(), digest_size=8).hexdigest()


def _landings_from_json(hf_name: str, parts: Any) -> tuple[Landing, ...]:
    return tuple(
        Landing(
            hf_name, name, ShapedView(offset, tuple(shape), tuple(strides)), ShapedView(to, tuple(shape), tuple(to_strides))
        )
        for name, shape, offset, strides, to, to_strides in parts
    )
