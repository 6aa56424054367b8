"""The wire of each transport: the message by which a worker finds the sender of an update. `UpdateRequest` contains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mbridge_rl.core.typed_values import AtLeastOne, AtLeastZero
from mbridge_rl.distributed.rendezvous import GroupAddress
from mbridge_rl.sync.payload.message_codec import Message


@dataclass(frozen=True, kw_only=True)
class Wire(Message):
    """What a worker needs to open its end of a transport; each transport has a subclass.

    Attributes:
        replica: the index of the worker's engine among the engines of equal layout.
    """

    replica: AtLeastZero = 0


@dataclass(frozen=True, kw_only=True)
class StoreWire(Wire):
    """The wire of the transport through a weight store on the trainer's host.

    Attributes:
        name: the name of the store.
        directory: the directory of the store.
        token: the token of the slot.
        fill: the fill of the slot.
        committed: whether the fill was committed before, so that nobody has verified its bytes just now.
    """

    name: str
    directory: str
    token: str
    fill: str
    committed: bool = False


@dataclass(frozen=True, kw_only=True)
class RingWire(Wire):
    """The wire of the transport through rings of buckets in shared memory.

    Attributes:
        paths: the files of the rings, by worker.
        update: the random number of the update.
        sources: number of trainer ranks.
        replicas: number of engines.
        cell_bytes: bytes of a bucket, by worker.
    """

    paths: tuple[str, ...]
    update: AtLeastZero
    sources: AtLeastOne
    replicas: AtLeastOne
    cell_bytes: tuple[AtLeastZero, ...]


@dataclass(frozen=True, kw_only=True)
class IpcWire(RingWire):
    """The wire of the transport through the trainer ranks' GPU memory, with counters in shared memory.

    Attributes:
        handles: by worker and trainer rank, the handle of the rank's buckets (`cuda_ipc.handle_of`).
    """

    handles: tuple[Mapping[str, list], ...]  # type: ignore[type-arg]


@dataclass(frozen=True, kw_only=True)
class GroupWire(Wire):
    """The wire of the transport over a process group of trainer ranks and workers.

    Attributes:
        address: where the members of the group meet.
        trainers: number of trainer ranks.
        workers: number of workers of one engine.
        replicas: number of engines.
    """

    address: GroupAddress
    trainers: AtLeastOne
    workers: AtLeastOne
    replicas: AtLeastOne


@dataclass(frozen=True, kw_only=True)
class FilesWire(Wire):
    """The wire of the transport through a folder of files.

    Attributes:
        url: the folder, as fsspec takes it.
    """

    url: str
